"""Cross-compile the kernels with other versions of Triton than the pinned one, each in an environment of its own.

    python tests/triton_versions.py                           3.6.0 and the newest on the package index
    python tests/triton_versions.py 3.6.0 3.8.0               these
    python tests/triton_versions.py newest -- --defaults      pass arguments on to cross_compile.py

For developers: CI compiles with the pinned version alone. The first run makes a virtual environment for each version in
a cache folder, with this Python and from the package index that pip is configured for; later runs use it again, and
bring the newest up to date. An environment holds Triton, the torch that constraints.txt pins, PyYAML and NumPy. No GPU
is needed, and no CUDA build of torch: an index that has only CPU builds (PIP_INDEX_URL) saves several GB of downloads.
Ends with status 1 if a kernel fails to compile, or does not fit, with any of the versions.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bootstrap import ROOT, SetupError, alone_in, clean_variables, is_usable, make_environment, read_stamp

VERSIONS = ("3.6.0", "newest")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    options = parse(sys.argv[1:] if argv is None else argv)
    failed = [version for version in options.versions if not passes(version, options.cache, options.passed_on)]
    print(f"== failed: {', '.join(failed) or 'none'}", flush=True)
    return int(bool(failed))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line; what stands after -- is passed on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", default=VERSIONS, metavar="VERSION", help="such as 3.6.0, or newest")
    parser.add_argument(
        "--cache", type=Path, default=cache_folder(), metavar="DIR", help="folder of the environments (%(default)s)"
    )
    split = list(argv).index("--") if "--" in argv else len(argv)
    options = parser.parse_args(argv[:split])
    options.passed_on = list(argv[split + 1 :])
    return options


def cache_folder() -> Path:
    """Where environments are kept by default."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "retgen"


def passes(version: str, cache: Path, arguments: Sequence[str]) -> bool:
    """Cross-compile with a version of Triton; return whether every kernel compiles and fits."""
    print(f"== Triton {version}", flush=True)
    try:
        python = environment(version, cache.absolute())
    except (SetupError, subprocess.CalledProcessError) as error:
        print(f"the environment could not be made: {error}", flush=True)
        return False
    command = [str(python), str(ROOT / "tests" / "cross_compile.py"), *arguments]
    return subprocess.run(command, cwd=ROOT, env=clean_variables(), check=False).returncode == 0


def environment(version: str, cache: Path) -> Path:
    """Make or complete the environment of a version; return its Python."""
    folder = cache / f"triton-{version}"
    with alone_in(cache):
        if not is_usable(folder, read_stamp(folder)):
            make_environment(folder)
        python = folder / "bin" / "python"
        # Up to 3.6, Triton's interpreter needs a NumPy below 2.4, and none needs a newer one.
        install(python, "-c", str(ROOT / "constraints.txt"), "torch", "PyYAML")
        install(python, "numpy<2.4")
        # On its own: a CUDA build of torch asks for the very Triton that it was released with.
        install(python, "--no-deps", "--upgrade", "triton" if version == "newest" else f"triton=={version}")
    return python


def install(python: Path, *arguments: str) -> None:
    """Let an environment's pip install something."""
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-input", "--progress-bar", "off", *arguments]
    subprocess.run(command, cwd=ROOT, env=clean_variables(), check=True)


if __name__ == "__main__":
    sys.exit(main())
