"""The training loop, on one page."""

from opensora.train.preparation import loss_share
from opensora.train.rollback import roll_back
from opensora.train.run import Run
from opensora.train.validate import catch_up, is_due, validate


def train(run: Run) -> bool:
    """One optimizer update per turn, until all are done or a stop was asked for; the state is then on disk.

    Returns:
        True when the run is finished, False when it was interrupted and can be resumed.

    Raises:
        TrainingDiverged: loss, gradients or copies of the state stay wrong after every remedy (anomaly_guard.py).
    """
    total = run.cfg.train.steps
    catch_up(run)
    while run.step < total:
        run.garbage.collect()
        run.enter("data")
        run.engine.set_lr(run.lr_at(run.step))
        elements = run.data.loss_terms(run.step)
        loss = run.zero_loss()
        for batch, is_last in run.data.microbatches(run.step):
            run.enter("encode")
            run.reads.note(batch, run.step)
            tokens = run.prepare(batch, run.step)
            run.enter("forward")
            share = loss_share(run.engine.model, tokens, elements)
            run.enter("backward")
            run.engine.backward(share, last_microbatch=is_last)
            loss += share.detach()
            run.enter("data")
        run.enter("update")
        update = run.guard.update(run.engine, run.mesh, run.step, loss)
        run.step += 1

        run.enter("agree")
        stop = run.stop.agreed()
        run.enter("record")
        run.record(update, last=stop or run.step == total)
        if not stop and (wanted := run.guard.wants_rollback(run.engine, run.mesh, run.step, run.enter)):
            roll_back(run, wanted)
            continue
        saves = stop or run.step == total
        saves = saves or (run.guard.last_step_ok and run.step % run.cfg.train.checkpoint_every == 0)
        if saves:
            run.save()
        if not stop and is_due(run):  # what was trained is on its way to the disk, however long this takes
            validate(run)
            stop = run.stop.agreed()
            if stop and not saves:
                run.save()
        run.enter("commit")
        run.checkpoints.poll()
        if stop and run.step < total:
            run.finish_saving()
            run.metrics.log_event("interrupted", run.step)
            return False
    run.finish_saving()
    if run.cfg.train.export:
        run.export()
    return True
