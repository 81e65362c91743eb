"""Checkpoints of a run, through orbax: WORKDIR/checkpoints/STEP/{variables,optimizer}."""

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from fastervit_jax.train.state import TrainState


def make_manager(workdir: pathlib.Path, *, every: int, keep: int) -> ocp.CheckpointManager:
    """A manager that saves in the background every `every` steps and keeps the `keep` newest.

    What a killed save left behind is removed.
    """
    policies = ocp.checkpoint_managers
    options = ocp.CheckpointManagerOptions(
        save_decision_policy=policies.FixedIntervalPolicy(every),
        preservation_policy=policies.LatestN(keep),
        cleanup_tmp_directories=True,
    )
    return ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options)


def save(manager: ocp.CheckpointManager, state: TrainState, step: int, *, force: bool) -> None:
    """Save the state, which has done `step` steps, if a save is due or forced."""
    items = ocp.args.Composite(
        variables=ocp.args.StandardSave(state.variables),
        optimizer=ocp.args.StandardSave({"step": state.step, "opt_state": state.opt_state}),
    )
    manager.save(step, args=items, force=force)


def restore(manager: ocp.CheckpointManager, state: TrainState) -> TrainState:
    """The newest saved state, of which there must be one, with the shapes, dtypes and shardings of `state`."""
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    saved = manager.restore(manager.latest_step(), args=ocp.args.Composite(
        variables=ocp.args.StandardRestore(abstract.variables),
        optimizer=ocp.args.StandardRestore({"step": abstract.step, "opt_state": abstract.opt_state}),
    ))
    return TrainState(**saved["variables"], **saved["optimizer"])


def restore_variables(
    workdir: pathlib.Path, abstract: dict[str, Any], sharding: jax.sharding.Sharding
) -> tuple[int, dict[str, Any]]:
    """Step of the newest checkpoint of a run, and its parameters and batch statistics, shaped as `abstract`.

    Raises FileNotFoundError if the workdir has none.
    """
    directory = (workdir / "checkpoints").absolute()
    with ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(create=False)) as manager:
        step = manager.latest_step()
        if step is None:
            raise FileNotFoundError(f"no checkpoint in {directory}: expected a workdir in which train.py has saved one")
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), abstract)
        args = ocp.args.Composite(variables=ocp.args.StandardRestore(target))
        return step, manager.restore(step, args=args)["variables"]
