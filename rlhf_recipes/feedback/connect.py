"""From the settings of a model to the client that asks it."""

from pathlib import Path

from ..recipe.values import Base
from ..records.folder import read_recipe
from .client import Client, ModelSettings
from .endpoint import Endpoint
from .local import bare_base, load_bare_model, load_run_model

FOR_ENDPOINTS = ("model_name", "api_key_env", "timeout", "retries")
FOR_MODELS = ("quantization", "chat_template")


def connect(settings: ModelSettings) -> Client:
    """The client of an endpoint, or of a local model, which is loaded.

    Raises ValueError where a setting belongs to the other kind, the model or its key is not there, or the endpoint does
    not answer.
    """
    if settings.is_endpoint:
        _refuse(settings, (*FOR_MODELS, "role"), " is for a local model, and this is an endpoint: {model}.")
        if (settings.retries or 0) < 0:
            raise ValueError(f"--retries must not be negative, but is {settings.retries}.")
        if settings.timeout is not None and not 0 < settings.timeout <= 86_400:
            raise ValueError(f"--timeout must be above 0 seconds and at most a day (86400), not {settings.timeout:g}.")
        return Endpoint(settings)
    _refuse(settings, FOR_ENDPOINTS, " is for an endpoint, and this is none: {model}.")
    if (Path(settings.model) / "recipe.json").is_file():
        _refuse(settings, FOR_MODELS, ": {model} is a run, whose recipe says that.")
        return load_run_model(Path(settings.model), settings.role)
    _refuse(settings, ("role",), " is for a run folder, and {model} is none.")
    return load_bare_model(settings)


def local_base(settings: ModelSettings) -> Base | None:
    """The base that `connect` would load; None where the model is behind an endpoint."""
    if settings.is_endpoint:
        return None
    if (Path(settings.model) / "recipe.json").is_file():
        return read_recipe(Path(settings.model)).base
    return bare_base(settings)


def _refuse(settings: ModelSettings, names: tuple[str, ...], reason: str) -> None:
    """Raises ValueError where one of these settings is given."""
    for name in names:
        if getattr(settings, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')}{reason.format(model=settings.model)}")
