"""Trains a tiny curriculum (two domains, two rounds each, a router) and prints the SHA-256 of every tensor file it leaves.

    python benchmarks/same_library.py > before.txt      # and after a change that should change no number
    python benchmarks/same_library.py | diff before.txt -

Equal lines prove that a change moved code and not numbers. Run both on one machine with the same number of threads.
"""

import hashlib
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path[0] = str(Path(__file__).parents[1] / "tests")

from support.curricula import curriculum_config  # noqa: E402
from support.models import tiny_llama  # noqa: E402
from support.processes import finish, start_train, train  # noqa: E402


def main() -> None:
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        router = {"epochs": 3, "samples": 12}
        config = curriculum_config(tiny_llama(folder / "model"), folder, ["chat", "code"], router=router)
        train(config, folder)
        finish([start_train(config, folder, "router")], folder)
        library = folder / "out" / "library"
        for path in sorted(library.rglob("*.safetensors")):
            print(hashlib.sha256(path.read_bytes()).hexdigest(), path.relative_to(library))


if __name__ == "__main__":
    main()
