"""Several processes: how they start, exchange tensors, share work, and stop together on a failure.

In reading order:

- `launch`: rank and world size, from torchrun's or Slurm's environment.
- `rendezvous`: opens the store at MASTER_ADDR that the processes of one start share.
- `folder_lock`: one process at a time fills a folder.
- `heartbeat`: detects that a process has failed, and why.
- `process_group`: joins the processes for the duration of a run.
- `collectives`: gathers, sums and broadcasts; the identity for a single process.
- `work_sharing`: splits a list of work over ranks, or does it on the main process alone.
- `rank_consistency`: checks that all ranks run the same program on the same data.
- `fsdp`: shards the towers over the ranks.
"""
