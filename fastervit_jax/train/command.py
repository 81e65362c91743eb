"""The command line that train.py and eval.py share. Importing this defines their flags."""

import pathlib
import sys
from collections.abc import Callable

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from fastervit_jax import compilation_cache
from fastervit_jax.train import processes

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The recipe, configs/digits.py if none is given; --config.a.b=value changes it.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run. Default: runs/, then the config's name.")
# Several processes, as docs/clusters.md has them.
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, on which it listens for the others.")
_PROCESSES = flags.DEFINE_integer("processes", None, "How many processes work together.")
_PROCESS = flags.DEFINE_integer("process", None, "Which of them this is, from 0.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Take the three from the environment: Slurm, Open MPI, Cloud "
                                 "TPU or Kubernetes.")
_HEARTBEAT = flags.DEFINE_integer("heartbeat", processes.HEARTBEAT, "Seconds without a sign of life of a process "
                                  "after which the others end.")


def _parse(argv: list[str]) -> list[str]:
    try:
        return app.parse_flags_with_usage(argv)
    except AttributeError as error:  # from ml_collections, for a key that the config does not have
        raise AttributeError(f"unknown config key {error}. Only keys that the config file has can be changed, "
                             "with --config.KEY=VALUE; look them up there, and those of the model in "
                             "fastervit_jax.ModelConfig.") from error


def run(main: Callable[[ConfigDict, pathlib.Path], None], *, cache: bool = True) -> None:
    """Parse the command line, join the other processes if there are any, and call main(config, workdir).

    `cache`: with the compilation cache.
    """
    argv = list(sys.argv)
    if not any(arg.split("=")[0] in ("-config", "--config") for arg in argv[1:]):
        argv.insert(1, "--config=configs/digits.py")

    def start(rest: list[str]) -> None:
        if len(rest) > 1:
            raise app.UsageError(f"unexpected arguments {rest[1:]}: settings are given as --config.a.b=value")
        config = _CONFIG.value
        workdir = pathlib.Path(_WORKDIR.value or f"runs/{config.name}")
        with processes.started(
            coordinator=_COORDINATOR.value, processes=_PROCESSES.value, process=_PROCESS.value,
            distributed=_DISTRIBUTED.value, heartbeat=_HEARTBEAT.value, settings=f"{workdir} {config}",
        ):
            if cache:
                compilation_cache.enable()
            main(config, workdir)

    flags.FLAGS.verbosity = logging.WARNING  # unless given; orbax tells of every step of every save
    app.run(start, argv=argv, flags_parser=_parse)
