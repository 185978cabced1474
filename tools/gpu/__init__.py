"""The parts of `tools/gpu_report.py`: what only a GPU can tell, each part bounded in time and kept when it is done."""
