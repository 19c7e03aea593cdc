"""Read a group of settings from environment variables, and say in one sentence what is wrong with them."""

from collections.abc import Mapping
from typing import TypeVar

from pydantic import ValidationError
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

S = TypeVar("S", bound="Environment")


class Environment(BaseSettings):
    """Settings whose fields are named by their variables. An empty variable counts as one that is not set."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", case_sensitive=True, hide_input_in_errors=True)


def read_environment(settings: type[S], environ: Mapping[str, str]) -> S:
    """The settings as ``environ`` has them; the process's own variables are not read besides.

    Raises:
        ValueError: a variable is missing, unknown or contradicts another; the message names it.
    """

    class Here(settings):  # type: ignore[valid-type, misc]
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            assert isinstance(env_settings, EnvSettingsSource), "variables are read as pydantic-settings reads them"
            env_settings.env_vars = {name: value for name, value in environ.items() if value}
            return (env_settings,)

    try:
        found: S = Here()
    except ValidationError as error:
        first = error.errors()[0]
        cause = first.get("ctx", {}).get("error")
        name = ".".join(str(part) for part in first["loc"])
        raise ValueError(str(cause) if cause else f"{name}: {first['msg']}") from None
    return found
