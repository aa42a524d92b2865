"""What is in the wheel and in the sdist: all that belongs there, and nothing else.

    python -m tools.dist_check build/dist

The reference is what git tracks. Also that the sdist builds the same wheel again.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: Bytes that a wheel may have at most.
MOST = 25_000_000
#: What an sdist holds that git does not track.
MADE = {"PKG-INFO"}


def tracked() -> set[str]:
    """The files of the repository."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return {name for name in listed.stdout.split("\0") if name}


def in_wheel(path: Path) -> set[str]:
    """The files of a wheel, without its metadata."""
    with zipfile.ZipFile(path) as wheel:
        return {name for name in wheel.namelist() if ".dist-info/" not in name}


def in_sdist(path: Path) -> set[str]:
    """The files of an sdist, without its top folder."""
    with tarfile.open(path) as sdist:
        return {m.name.split("/", 1)[1] for m in sdist.getmembers() if m.isfile()}


def rebuilt(path: Path) -> set[str]:
    """The files of the wheel that an unpacked sdist builds."""
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(path) as sdist:
            sdist.extractall(folder, filter="data")
        (top,) = Path(folder).iterdir()
        build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", "out"]
        subprocess.run(build, cwd=top, check=True, capture_output=True)
        (wheel,) = (top / "out").glob("*.whl")
        return in_wheel(wheel)


def differences(dist: Path) -> list[str]:
    """What is wrong, one line each."""
    (wheel,) = dist.glob("*.whl")
    (sdist,) = dist.glob("*.tar.gz")
    files = tracked()
    package = {name for name in files if name.startswith("mi_hops/")}
    found, source = in_wheel(wheel), in_sdist(sdist)
    wrong = [f"the wheel lacks {name}" for name in sorted(package - found)]
    wrong += [f"the wheel holds {name}" for name in sorted(found - package)]
    wrong += [f"the sdist lacks {name}" for name in sorted(package - source)]
    wrong += [f"the sdist holds {name}" for name in sorted(source - files - MADE)]
    if rebuilt(sdist) != found:
        wrong.append("the sdist builds another wheel")
    if (size := wheel.stat().st_size) > MOST:
        wrong.append(f"the wheel has {size / 1e6:.1f} MB; at most {MOST / 1e6:.0f}")
    print(f"{wheel.name}: {len(found)} files, {wheel.stat().st_size / 1e6:.1f} MB")
    print(f"{sdist.name}: {len(source)} files, {sdist.stat().st_size / 1e6:.1f} MB")
    return wrong


def main(dist: str) -> None:
    """Print sizes, and what is wrong; the exit code says whether anything is."""
    wrong = differences(Path(dist))
    print("\n".join(wrong))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main(*sys.argv[1:])
