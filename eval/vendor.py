"""Remakes the scripts of others that the evaluation's page carries, from their published packages.

    python eval/vendor.py            packs the versions below with npm, and writes files, licences and hashes
    python eval/vendor.py --check    the same into a temporary folder, and says what differs

Only who changes a version needs npm: the files are committed, installed with the package, and their hashes tested.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "llmdistill" / "evals" / "page" / "vendor"
# name -> (version, its file that the page carries, its licence); without a file: it is part of markdown-it's
PACKAGES = {
    "temml": ("0.13.5", "dist/temml.min.js", "LICENSE"),
    "markdown-it": ("15.0.3", "dist/browser/markdown-it.umd.min.js", "LICENSE"),
    "linkify-it": ("6.1.0", "", "LICENSE"),
    "mdurl": ("2.1.0", "", "LICENSE"),
    "uc.micro": ("3.0.0", "", "LICENSE.txt"),
    "entities": ("8.1.0", "", "LICENSE"),
    "punycode.js": ("2.3.1", "", "LICENSE-MIT.txt"),
}


def make(folder: Path) -> None:
    """Writes NAME.min.js, LICENSES.txt and hashes.json: the SHA-256 of every file, and of the packages they are of."""
    folder.mkdir(parents=True, exist_ok=True)
    hashes, licences = dict[str, str](), list[str]()
    for name, (version, script, licence) in PACKAGES.items():
        package = packed(name, version)
        hashes[f"{name}-{version}.tgz"] = hashlib.sha256(package).hexdigest()
        licences.append(f"{name} {version}\n\n{member(package, licence).strip()}\n")
        if script:
            text = "".join(
                line for line in member(package, script).splitlines(keepends=True) if "# sourceMappingURL" not in line
            )
            file = folder / f"{name}.min.js"
            file.write_text(text, "utf-8")
            hashes[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    file = folder / "LICENSES.txt"
    file.write_text(("\n" + "-" * 72 + "\n\n").join(licences), "utf-8")
    hashes[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    (folder / "hashes.json").write_text(json.dumps(hashes, indent=1) + "\n")


def packed(name: str, version: str) -> bytes:
    """A package as it is published; npm checks that it is the one its registry promises."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", "--silent", f"{name}@{version}"]
        file = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()
        return (Path(folder) / file.splitlines()[-1]).read_bytes()


def member(package: bytes, path: str) -> str:
    with tarfile.open(fileobj=io.BytesIO(package)) as archive:
        file = archive.extractfile(f"package/{path}")
        assert file is not None, path
        return file.read().decode("utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        make(FOLDER)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        names = sorted({p.name for p in (*Path(folder).iterdir(), *FOLDER.iterdir())})
        differ = [n for n in names if _read(Path(folder) / n) != _read(FOLDER / n)]
    print("\n".join(f"{name} differs" for name in differ) or "all as published")
    return 1 if differ else 0


def _read(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


if __name__ == "__main__":
    sys.exit(main())
