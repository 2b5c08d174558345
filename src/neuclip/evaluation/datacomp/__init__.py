"""DataComp's 38 evaluation tasks.

Modules in reading order:

- `suite`: tasks and averages, read from `suite.yaml`.
- `sets`: the layout of a set on disk, and how it is opened.
- `imagenet`: ImageNet's validation images in class folders, as a set.
- `task_evaluation`: evaluates a task as DataComp does.
- `download`: downloads sets from the Hugging Face hub.
- `convert`: converts retrieval sets and WinoGAViL to the layout of the others.
- `__main__`: DataComp's command line.
"""
