"""The smallest Serve applications for tests of a supervisor: one that answers, and one that cannot start."""

from fastapi import FastAPI
from ray import serve
from ray.serve import Application

api = FastAPI()


@api.get("/readyz")
async def ready() -> dict[str, bool]:
    return {"ready": True}


@serve.deployment(ray_actor_options={"num_cpus": 0.1})
@serve.ingress(api)
class Answering:
    """Answers ``/readyz``."""


@serve.deployment(ray_actor_options={"num_cpus": 0.1}, max_constructor_retry_count=1)
class Broken:
    """Raises in its constructor."""

    def __init__(self) -> None:
        raise RuntimeError("the weights are of another model")


def build(_: dict[str, object]) -> Application:
    return Answering.bind()


def build_broken(_: dict[str, object]) -> Application:
    return Broken.bind()
