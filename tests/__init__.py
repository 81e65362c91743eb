QUICKLY = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
"""XLA's flags to compile for CPUs in a third of the time. It takes three times as long to run, of little."""
