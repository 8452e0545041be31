"""A family as an application of Ray Serve, for more than one machine.

    serve run tocom.serving.ray.app:app engines=/shared/digits objective_ms=50 max_replicas=4

Ray gives the arguments, as text, to `app`; a configuration file of `serve deploy` names them under `args`. What can
change while the replicas run is in the deployment's `user_config` (`tocom.serving.ray.replica.Tuning`).
"""

# no `from __future__ import annotations`: Ray looks at the type of app's parameter, which must not be text

import hashlib
import json
import math
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application

from tocom.runtime.errors import InputError, one_line
from tocom.runtime.manifest import Family
from tocom.serving.protocol.http_guard import HttpLimits
from tocom.serving.ray.ingress import FamilyIngress, IngressOptions, to_ingress
from tocom.serving.ray.replica import FamilyReplica, Tuning
from tocom.serving.service.options import MAX_PIXELS, Limits, ServeOptions

MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_WAITING = 64  # requests that the ingress takes beyond its limit, to refuse them itself
_GRACE_S = 30.0
_HEALTH_S = 5.0
_LOOK_BACK_S = 12.0  # that the load is averaged over; Ray wants it to be more than the 10 s between its reports


class FamilyArgs(BaseModel):
    """What an application is built from.

    Attributes:
        engines: Folder of the family, at the same place on every node.
        name: Of the model in the protocol; the folder's name by default.
        objective_ms: What 99 of 100 requests are to take at most: every replica's own load chooses its degree. None:
            the degree never changes.
        degree: Where the degree begins; the lowest by default.
        fixed: Degrees such as "0,16": one deployment each, which scales by itself and always answers at its degree. A
            request is answered by the first whose degree it allows. Not together with `objective_ms` and `degree`.
        generation: Another value than before has every replica look for another family in the folder.
        min_replicas: Of each deployment; so many run without load.
        max_replicas: So many run under load.
        target_ongoing_requests: Per replica, on average, that scaling aims at.
        upscale_delay_s: For how long there must be more before replicas are added.
        downscale_delay_s: For how long there must be fewer before replicas are removed.
        max_ongoing_requests: That a replica takes at most; what its queue and one batch hold by default.
        max_queued_requests: That wait for a replica to take them; more are refused with 503.
        num_cpus: Of Ray, for one replica; also the threads of its engines, unless `threads` says otherwise.
        num_gpus: Likewise.
        threads: CPU threads for one batch.
        max_batch: Images that run together.
        max_queue: Images that wait in a replica.
        max_wait_s: After waiting so long in a replica a request is refused.
        max_body_mib: Size of a request.
        max_megapixels: Size of an image, decoded.
        max_requests: That are being answered at the same time by one ingress.
        ingress_replicas: Processes that take requests from Ray's proxies; they need little.
    """

    model_config = ConfigDict(extra="forbid")

    engines: str
    name: str | None = None
    objective_ms: float | None = Field(None, gt=0, allow_inf_nan=False)
    degree: int | None = Field(None, ge=0)
    fixed: str | None = None
    generation: int | str = 0
    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(1, ge=1)
    target_ongoing_requests: float = Field(16, gt=0)
    upscale_delay_s: float = Field(5, ge=0)
    downscale_delay_s: float = Field(120, ge=0)
    max_ongoing_requests: int | None = Field(None, ge=1)
    max_queued_requests: int = Field(64, ge=1)
    num_cpus: float = Field(1, ge=0)
    num_gpus: float = Field(0, ge=0)
    threads: int | None = Field(None, ge=1)
    max_batch: int = Field(32, ge=1)
    max_queue: int = Field(256, ge=1)
    max_wait_s: float = Field(30, gt=0)
    max_body_mib: int = Field(16, ge=1, le=1024)
    max_megapixels: float = Field(MAX_PIXELS / 1e6, gt=0)
    max_requests: int = Field(512, ge=1)
    ingress_replicas: int = Field(1, ge=1)


def app(args: FamilyArgs) -> Application:
    """Builds the application.

    Args:
        args: See there.

    Raises:
        InputError: The family cannot be read here, or has not what the arguments name.
    """
    return family_app(args)


def family_app(args: FamilyArgs, *, draining: bool = False) -> Application:
    """Builds the application, which `app` does for Ray, whose builders have one argument.

    Args:
        args: See there.
        draining: Whether no more requests are taken; see `FamilyIngress.reconfigure`.

    Raises:
        InputError: The family cannot be read here, or has not what the arguments name.
    """
    folder = Path(args.engines).resolve()
    name = folder.name if args.name is None else args.name
    if not MODEL_NAME.fullmatch(name):
        raise InputError(f"a model's name must be letters, digits, _, - and ., got {one_line(name)}: give a name")
    if args.max_replicas < args.min_replicas:
        raise InputError(f"max_replicas must be min_replicas or more, got {args.max_replicas} and {args.min_replicas}")
    fixed = _fixed(args)
    if not draining:  # the end must not depend on what is on the disk by then
        _check(folder, fixed or (() if args.degree is None else (args.degree,)))
    if fixed:
        deployments = {
            degree: _deployment(args, f"family-r{degree:02}", Tuning(degree=degree, generation=args.generation))
            for degree in fixed
        }
    else:
        tuning = Tuning(objective_ms=args.objective_ms, degree=args.degree, generation=args.generation)
        deployments = {0: _deployment(args, "family", tuning)}
    options = _options(args)
    handles = {degree: deployment.bind(str(folder), name, options) for degree, deployment in deployments.items()}
    limits = HttpLimits(args.max_body_mib << 20, max_requests=args.max_requests)
    front = IngressOptions(name, limits, answer_s=args.max_wait_s + _GRACE_S, version=_version())
    return _ingress(args, draining).bind(front, handles)


def _check(folder: Path, degrees: tuple[int, ...]) -> None:
    family = Family.read(folder)
    if not family.engines:
        raise InputError(f"{one_line(folder)} has no finished engine: compile one with `tocom compile`")
    for degree in degrees:
        family.entry(degree)


def _fixed(args: FamilyArgs) -> tuple[int, ...]:
    if args.fixed is None:
        return ()
    if args.objective_ms is not None or args.degree is not None:
        raise InputError("fixed gives every deployment its degree: give no objective_ms or degree with it")
    words = [word.strip() for word in str(args.fixed).split(",")]
    if not all(word.isascii() and word.isdigit() and len(word) < 6 for word in words):
        raise InputError(f"fixed must be degrees such as 0,16, got {one_line(args.fixed)[:80]}")
    return tuple(sorted({int(word) for word in words}))


def _options(args: FamilyArgs) -> ServeOptions:
    return ServeOptions(
        workers=0,
        threads=args.threads or max(math.floor(args.num_cpus), 1),
        limits=Limits(args.max_batch, args.max_queue, args.max_wait_s),
        max_pixels=int(args.max_megapixels * 1e6),
    )


def _deployment(args: FamilyArgs, name: str, tuning: Tuning) -> serve.Deployment:
    if args.max_replicas > args.min_replicas:
        replicas: dict[str, Any] = {
            "autoscaling_config": {
                "min_replicas": args.min_replicas,
                "max_replicas": args.max_replicas,
                "target_ongoing_requests": args.target_ongoing_requests,
                "upscale_delay_s": args.upscale_delay_s,
                "downscale_delay_s": args.downscale_delay_s,
                "look_back_period_s": _LOOK_BACK_S,
            }
        }
    else:
        replicas = {"num_replicas": args.min_replicas}
    return serve.deployment(
        FamilyReplica,
        name=name,
        # the same version again has Ray pass only user_config on, instead of starting new replicas
        version=_hash(args),
        user_config=tuning.model_dump(),
        max_ongoing_requests=args.max_ongoing_requests or args.max_queue + args.max_batch,
        max_queued_requests=args.max_queued_requests,
        ray_actor_options={"num_cpus": args.num_cpus, "num_gpus": args.num_gpus},
        health_check_period_s=_HEALTH_S,
        health_check_timeout_s=30.0,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=args.max_wait_s + _GRACE_S,
        max_constructor_retry_count=3,
        **replicas,
    )


def _ingress(args: FamilyArgs, draining: bool) -> serve.Deployment:
    return serve.deployment(
        serve.ingress(to_ingress())(FamilyIngress),
        name="ingress",
        version=_hash(args),
        user_config={"draining": draining},
        num_replicas=args.ingress_replicas,
        max_ongoing_requests=args.max_requests + _WAITING,
        max_queued_requests=_WAITING,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=args.max_wait_s + 2 * _GRACE_S,
    )


def _hash(args: FamilyArgs) -> str:
    """Of everything that takes new replicas to change."""
    fixed = args.model_dump(exclude=set(Tuning.model_fields) if args.fixed is None else {"generation"})
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:16]


def _version() -> str:
    try:
        return version("tocom")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"
