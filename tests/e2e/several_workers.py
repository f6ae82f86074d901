"""What a server with several worker processes imports: the parts of `syncer serve`, in each."""

from __future__ import annotations

from fastapi import FastAPI

from syncer.service.runtime import Runtime
from syncer.settings import Settings


def create() -> FastAPI:
    """Start this process's parts on the folder that all share; the app ends them."""
    return Runtime.start(Settings.load()).app
