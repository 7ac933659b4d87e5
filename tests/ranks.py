"Several processes over gloo, forked from one server that has imported everything, so that sixteen start in seconds."
import contextlib
import multiprocessing
import os
import socket
import traceback

context = multiprocessing.get_context('forkserver')
context.set_forkserver_preload(['scratchdet.train'])


def free_port():
    "A port on which nobody listens."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def _work(queue, rank, processes, port, do, args):
    "What one process does; its result or its error goes to the queue."
    import torch
    places = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes, MASTER_PORT=port)
    os.environ.update({'MASTER_ADDR': '127.0.0.1', **{k: str(v) for k, v in places.items()}})
    torch.set_num_threads(1)
    try: queue.put((rank, do(*args), None))
    except BaseException: queue.put((rank, None, traceback.format_exc()))
    with contextlib.suppress(Exception): torch.distributed.destroy_process_group()


def run_ranks(do, processes, *args, seconds=300):
    "What `do(*args)` returns in each of so many processes, which see one another as a launcher would show them."
    queue, port = context.Queue(), free_port()
    ranks = [context.Process(target=_work, args=(queue, i, processes, port, do, args)) for i in range(processes)]
    for o in ranks: o.start()
    try: found = {rank: (value, error) for rank, value, error in (queue.get(timeout=seconds) for _ in ranks)}
    finally:
        for o in ranks:
            o.join(timeout=20)
            o.kill()
    errors = [error for _, error in found.values() if error]
    assert not errors, errors[0]
    return [found[i][0] for i in range(processes)]
