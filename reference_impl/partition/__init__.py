"""One model over several processes, for checkpoints that are too large for one: by layers or by columns.

    torchrun --nproc-per-node 2 -m reference_impl.partition --checkpoint DIR --ids 1,15,4

`pipeline`: each process holds a run of blocks; hidden states go from one to the next. Results are bit for bit those of
one process. `tensor_parallel`: each process holds a part of every projection; partial sums are added up.

Every process makes the same calls with the same token ids, so that nothing but hidden states (`pipeline`) and partial
sums (`tensor_parallel`) is ever sent. What starts the processes and joins them into a group is torch.distributed.
"""
