import importlib.metadata

QUICKLY = "--xla_backend_optimization_level=0"
"""XLA's flags to compile for CPUs in a third of the time. It takes three times as long to run, of little."""
if importlib.metadata.version("jaxlib") < "0.11":  # later ones do not have the flag
    QUICKLY += " --xla_cpu_use_fusion_emitters=false"
