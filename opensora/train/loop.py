"""The training loop, on one page."""

from opensora.train.setup import Run
from opensora.train.step import loss_share
from opensora.train.validate import sample_prompts


def train(run: Run) -> bool:
    """One optimizer update per turn, until all are done or a stop was asked for; the state is then on disk.

    Returns:
        True when the run is finished, False when it was interrupted and can be resumed.
    """
    total = run.cfg.train.steps
    while run.step < total:
        run.engine.set_lr(run.lr_at(run.step))
        elements = run.data.global_elements(run.step)
        loss = run.zero_loss()
        for batch, is_last in run.data.microbatches(run.step):
            run.reads.note(batch, run.step)
            tokens = run.prepare(batch, run.step)
            share = loss_share(run.engine.model, tokens, elements)
            run.engine.backward(share, last_microbatch=is_last)
            loss += share.detach()
        grad_norm = run.engine.step(run.step)
        run.step += 1

        stop = run.stop.agreed()
        run.metrics.record(run, loss, grad_norm, last=stop or run.step == total)
        if run.cfg.validate.every and run.step % run.cfg.validate.every == 0:
            sample_prompts(run)
        if stop or run.step == total or run.step % run.cfg.train.checkpoint_every == 0:
            run.save()
        run.checkpoints.poll()
        if stop and run.step < total:
            run.checkpoints.wait()
            run.metrics.note("interrupted", run.step)
            return False
    run.checkpoints.wait()
    if run.cfg.train.export:
        run.export()
    return True
