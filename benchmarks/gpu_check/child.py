"""The process of a part: `python -m gpu_check.child MODULE JOB`."""

import importlib
import sys

from gpu_check.part import Job

if __name__ == "__main__":
    importlib.import_module(sys.argv[1]).run(Job.from_json(sys.argv[2]))
