"""What `modal deploy` reads from its environment: names, sizes, and the worker's schedule."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from syncer.errors import SettingsError
from syncer.settings import AckMode

_PREFIX = "SYNCER_MODAL_"


class DeploySettings(BaseSettings):
    """Settings of the deployment, each `SYNCER_MODAL_…` in the environment of `modal deploy`.

    `volume_version` 1 holds up to 50,000 files and is the one with a promise; 2 is Modal's beta.
    """

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX, hide_input_in_errors=True, env_ignore_empty=True, frozen=True
    )

    app: str = "syncer"
    volume: str = "syncer-segments"
    volume_version: Literal[1, 2] = 1
    secret: str = "syncer"
    python: Literal["3.11", "3.12", "3.13"] = "3.11"
    ack: AckMode = "adaptive"
    # One is always warm: a cold start is seconds, and a client's first write would wait for it.
    min_containers: int = 1
    # Each has its own buffer and commits to one Volume, which takes five committers at once.
    max_containers: int = 5
    scaledown_s: int = 300  # 2 to 3,600: a container that goes has to ship what it holds
    requests_per_container: int = 100
    # Every minute; Modal checks the string when it is deployed.
    cron: str = "* * * * *"

    @classmethod
    def load(cls) -> Self:
        """Read the environment; raises SettingsError naming a bad value."""
        try:
            return cls()
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            name = _PREFIX + str(first["loc"][0]).upper()
            hint = "see docs/SUPABASE_SETUP.md, Deploy"
            raise SettingsError(name, first["msg"], hint=hint) from None
