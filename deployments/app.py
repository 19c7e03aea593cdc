"""The two Serve applications, ``farebox`` and ``billing``, bound from their deployments."""

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from deployments.billing_actor import BillingActor
from deployments.config import BillingArgs, FareboxArgs
from deployments.gateway.ingress import GatewayIngress
from deployments.replica.replica import LoraReplica

OPEN_STREAMS = 1_000
LONGEST_STREAM_S = 120.0


def build(args: FareboxArgs) -> Application:
    """The API and the models: the Gateway in front of LoraReplica."""
    replica = serve.deployment(
        name="LoraReplica",
        max_ongoing_requests=args.engine.max_queued + args.engine.max_running,
        graceful_shutdown_timeout_s=LONGEST_STREAM_S,
        ray_actor_options={"num_cpus": 0.5},
        request_router_config=RequestRouterConfig(
            request_router_class="deployments.replica.routing:AdapterRouter",
            request_router_kwargs={"spread_after": max(1, args.engine.max_running // 2)},
        ),
    )(LoraReplica)
    gateway = serve.deployment(
        name="Gateway",
        max_ongoing_requests=OPEN_STREAMS,
        graceful_shutdown_timeout_s=LONGEST_STREAM_S,
        ray_actor_options={"num_cpus": 0.1},
    )(serve.ingress()(GatewayIngress))
    return gateway.bind(args, replica.bind(args))


def build_billing(args: BillingArgs) -> Application:
    """The billing actor: one replica without a route. A change to the models does not restart it."""
    actor = serve.deployment(name="BillingActor", num_replicas=1, ray_actor_options={"num_cpus": 0.1})(BillingActor)
    return actor.bind(args)
