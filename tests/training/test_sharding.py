"""Training with weights cut over two ranks (gloo) against one process: losses, files, resuming, and what is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train as script
from configurator import configure
from core.checkpoints.checkpoint import load_checkpoint, verify_checkpoint
from core.checkpoints.weights import build_model
from core.common.errors import UserError
from core.logger import read_metrics
from core.trainer import train

ROOT = Path(__file__).parent.parent.parent
OPTIONS = ('--dataset=tiny --n_layer=2 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4 --lr_decay_iters=8 '
           '--warmup_iters=2 --eval_interval=4 --eval_iters=3 --log_interval=1 --device=cpu --compile=False '
           '--sample_length=12 --add_sampler_head=True --start_sampler_iteration=2 --add_critic_head=True '
           '--start_critic_iteration=3 --end_critic_iteration=6 --gradient_accumulation_steps=4 '
           '--optimizer=adamw').split()
CUT = '''
import sys
sys.path.insert(0, {root!r})
import core.objective
import train as script
from configurator import configure
from core.trainer import train
core.objective.MOST_LOGITS = 200
train(configure(script.TrainConfig, [*{options!r}, '--sharding=full', '--activation_checkpointing=True',
                                     '--out_dir=cut', *sys.argv[1:]]).config, [])
'''


def run(*arguments: str) -> None:
    """train.py's main in this process."""
    train(configure(script.TrainConfig, [*OPTIONS, *arguments]).config, [])


def test_two_ranks_with_a_part_of_the_weights_each_are_as_good_as_one_process(small_corpus):
    """All three stages, two micro-steps a rank, three validation batches, stopped after four iterations and resumed by
    the ranks; then the file that they saved is resumed by one process. The ranks take their losses in chunks and
    compute their layers again."""
    Path('cut.py').write_text(CUT.format(root=str(ROOT), options=OPTIONS))
    # each in processes of its own: a second group of the same ones may meet at an address of the first and hang
    for further in (['--max_iters=4'], ['--max_iters=8', '--init_from=resume']):
        result = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
                                 'cut.py', *further], env={**os.environ, 'OMP_NUM_THREADS': '1'}, capture_output=True,
                                text=True, timeout=240)
        assert result.returncode == 0, result.stderr[-3000:]
    run('--max_iters=8', '--out_dir=whole')
    records = [read_metrics(Path(folder) / 'metrics.jsonl') for folder in ('whole', 'cut')]
    timed = ('seconds', 'mfu', 'train_seconds', 'time', 'train/tokens_per_second')
    assert len(records[0]) == len(records[1]) > 8
    for one, other in zip(*records):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert name in timed or value == (pytest.approx(other[name], rel=1e-3) if isinstance(value, float)
                                              else other[name]), name
    whole, cut = (load_checkpoint(Path(folder) / 'ckpt.pt') for folder in ('whole', 'cut'))
    for one, other in ((whole.model, cut.model), (whole.ema, cut.ema)):
        assert one.keys() == other.keys()
        assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in one)
    assert torch.equal(build_model(cut, use_ema=False).lm_head.weight, cut.model['transformer.wte.weight'])
    assert verify_checkpoint(Path('cut/ckpt.pt')).parameters == verify_checkpoint(Path('whole/ckpt.pt')).parameters
    for one, other in zip(whole.optimizers[0]['state'].values(), cut.optimizers[0]['state'].values(), strict=True):
        assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in one)
    run('--max_iters=9', '--out_dir=cut', '--init_from=resume')
    run('--max_iters=9', '--out_dir=whole', '--init_from=resume')
    last = [read_metrics(Path(folder) / 'metrics.jsonl')[-1]['val/nelbo'] for folder in ('whole', 'cut')]
    assert last[0] == pytest.approx(last[1], rel=1e-3)


@pytest.mark.parametrize('arguments, words', [
    (['--optimizer=muon'], 'take --optimizer=adamw'), (['--compile=True'], 'leave compile out'),
    ([], 'one process has nobody to share with')])
def test_what_sharding_cannot_do_is_one_clear_sentence(small_corpus, arguments, words):
    with pytest.raises(UserError, match=words):
        run('--max_iters=1', '--sharding=full', *arguments)
