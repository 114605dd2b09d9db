"""Every example command of the two sampling guides, run as written through sample.py once its checkpoints exist.

The models are small, over the letters of the prompts, with blocks of 256: 512 tokens go by blocks.
"""

import math
import re
import shlex
import string
from collections import Counter
from pathlib import Path

import pytest

import sample
from configurator import configure
from core.data.vocabulary import Vocabulary
from helpers.toys import model_over, model_that_knows, save_model

VOCABULARY = Vocabulary(kind='characters', tokens=tuple('\n ' + string.ascii_letters))
BLOCK = 256

GUIDE_CONFIG = """
checkpoint_name = 'big_boy2.pt'  # Your trained checkpoint
remasking_checkpoint_name = None  # Optional remasking model
diffusion_iterations = 50        # Number of demasking steps
start_ratio = 0.95              # Start with 95% tokens masked
end_ratio = 0.05                # End with 5% tokens masked
temperature = 0.8               # Sampling temperature
top_p = 1.0                     # Nucleus sampling (1.0 = disabled)
randomness_strength = 0.4       # 0.0 = pure model-guided, 1.0 = pure random
intelligent_remasking = True    # Use model confidence for remasking
"""
GUIDE_SCHEDULE = """
schedule_type = 'custom'
masking_ratios = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05]
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A working folder with the checkpoints that the guides name."""
    folder = tmp_path_factory.mktemp('guides')
    for seed, (name, sampler_head) in enumerate((('ckpt_best.pt', False), ('big_boy2.pt', False),
                                                 ('optimal2_3400.pt', True))):
        save_model(folder / 'out' / name, VOCABULARY, model_over(
            VOCABULARY, seed, block_size=BLOCK, add_critic_head=True, add_sampler_head=sampler_head))
    save_model(folder / 'out' / 'remasking_model.pt', VOCABULARY,
               model_that_knows(VOCABULARY, 'aeiou', block_size=BLOCK, mode='token_classifier'),
               'classifier')
    save_model(folder / 'out' / 'judge.pt', VOCABULARY,
               model_over(VOCABULARY, mode='sequence_scorer', block_size=BLOCK + 1), 'judge')
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Runs a command line of sample.py in that folder and gives what it printed."""
    monkeypatch.chdir(folder)

    def run(command: str) -> str:
        words = shlex.split(command)
        assert words[:2] == ['python', 'sample.py']
        sample.main(words[2:])
        return capsys.readouterr().out

    return run


def texts_of(out: str) -> list[str]:
    return re.findall(r'--- sample \d+[^\n]*\n(.*?)(?=\n---)', out, re.S)


def calls_of(out: str) -> tuple[int, int]:
    """Trunk calls and network calls."""
    return tuple(map(int, re.search(r'(\d+) trunk calls, (\d+) network calls', out).groups()))


def confidence_of(out: str) -> float:
    """Nats per token."""
    return float(re.search(r'self-confidence (-\d+\.\d+) nats per token', out)[1])


def entropy_of(out: str) -> float:
    """Of the characters of all texts, in nats."""
    counts = Counter(''.join(texts_of(out))).values()
    return -sum(count / sum(counts) * math.log(count / sum(counts)) for count in counts)


def test_basic_diffusion_sampling_goes_by_blocks(run):
    """512 tokens in blocks of 256 with half a block of context: three windows of 50 predictions."""
    out = run('python sample.py --sampling_method=diffusion --num_samples=4 --sequence_length=512')
    assert [len(text) for text in texts_of(out)] == [512] * 4 and calls_of(out) == (150, 150)
    assert not set('_#~^') & set(''.join(texts_of(out))) and '2048 tokens in' in out


def test_standard_sampling_continues_the_prompt(run):
    out = run('python sample.py --sampling_method=standard --max_new_tokens=100 --start_text="To be or not to be"')
    assert all(text.startswith('To be or not to be') and len(text) == 118 for text in texts_of(out))
    assert calls_of(out) == (100, 100) and len(set(texts_of(out))) == 4


def test_iterations_and_temperature(run):
    out = run('python sample.py --sampling_method=diffusion --iterations=32 --temperature=0.7')
    assert calls_of(out) == (32, 32) and [len(text) for text in texts_of(out)] == [BLOCK] * 4
    usual = run('python sample.py --sampling_method=diffusion --iterations=32')
    assert texts_of(usual) == texts_of(run('python sample.py --sampling_method=diffusion --iterations=32 '
                                           '--temperature=0.8'))
    assert confidence_of(out) > confidence_of(usual) and entropy_of(out) < entropy_of(usual)


def test_a_remasking_model_changes_the_text(run):
    """It calls vowels wrong, so that few of them are left; self-confidence does not mind them."""
    out = run('python sample.py --remasking_checkpoint_name=remasking_model.pt --randomness_strength=0.2')
    plain = run('python sample.py --randomness_strength=0.2')
    assert calls_of(out) == (50, 99) and calls_of(plain) == (50, 50) and 'remasking model ' in out
    vowels, before = (sum(text.count(vowel) for text in texts_of(printed) for vowel in 'aeiou')
                      for printed in (out, plain))
    assert vowels < 0.5 * before


def test_a_custom_schedule_makes_one_prediction_more_than_it_has_ratios(run):
    out = run('python sample.py --schedule_type=custom --masking_ratios="[0.95,0.8,0.6,0.4,0.2,0.05]"')
    assert calls_of(out) == (7, 7)


def test_debug_mode_shows_shares_and_previews(run):
    out = run('python sample.py --log_debug=True --use_verbose_logging=True')
    assert '4 samples of 256 tokens in 1 block of' in out and 'the other 4 ids never' in out
    assert out.count('first preview: ') == out.count('last preview: ') == 1
    remasked = re.findall(r'step (\d+) remask: (\d+) positions changed, ([\d.]+)% masked', out)
    assert [int(step) for step, *_ in remasked] == [*range(49)]
    assert [remasked[0][1:], remasked[-1][1:]] == [(str(4 * 243), '94.9'), (str(4 * 13), '5.1')]
    assert out.count(' predict: ') == 50 and out.count(', 0.0% masked, mean log-probability -') == 50


def test_high_quality_generation(run):
    out = run('python sample.py --diffusion_iterations=100 --temperature=0.6 --intelligent_remasking=True')
    assert calls_of(out) == (100, 100)
    usual = run('python sample.py --diffusion_iterations=100 --intelligent_remasking=True')
    assert confidence_of(out) > confidence_of(usual) and entropy_of(out) < entropy_of(usual)


def test_shakespeare_generation(run):
    out = run('python sample.py --checkpoint_name=optimal2_3400.pt --sampling_method=diffusion --sequence_length=256 '
              '--diffusion_iterations=25 --temperature=0.7 --num_samples=3')
    assert re.search(r'25 network calls, \d{3,} waves', out)  # through the sampler head
    assert entropy_of(out) < entropy_of(run(
        'python sample.py --checkpoint_name=optimal2_3400.pt --sampling_method=diffusion --sequence_length=256 '
        '--diffusion_iterations=25 --num_samples=3 --temperature=1.2'))
    assert calls_of(out) == (25, 25) and [len(text) for text in texts_of(out)] == [256] * 3
    assert re.search(r'self-confidence -\d+\.\d+ nats per token \(masked pseudo-likelihood in 8 groups\)', out)
    assert re.search(r"\ncharacters: '.' \d+\.\d%", out) and re.search(r'\npatterns: ', out)


def test_creative_writing(run):
    out = run('python sample.py --sampling_method=diffusion --sequence_length=512 --temperature=1.0 --top_p=0.9 '
              '--intelligent_remasking=True --diffusion_iterations=50')
    assert calls_of(out) == (150, 150) and [len(text) for text in texts_of(out)] == [512] * 4
    whole = run('python sample.py --sampling_method=diffusion --sequence_length=512 --temperature=1.0 '
                '--intelligent_remasking=True --diffusion_iterations=50')
    narrow = run('python sample.py --sampling_method=diffusion --sequence_length=512 --temperature=1.0 --top_p=0.3 '
                 '--intelligent_remasking=True --diffusion_iterations=50')
    assert confidence_of(narrow) > confidence_of(out) > confidence_of(whole)
    assert entropy_of(narrow) < entropy_of(out) < entropy_of(whole)


def test_the_judge_scores_samples(run):
    out = run('python sample.py --quality_metric=judge --judge_checkpoint_name=judge.pt --iterations=2')
    assert len(re.findall(r'--- sample \d \(judge score 0\.\d{3}\)', out)) == 4
    assert re.search(r'judge score 0\.\d{3} \(1 - evaluation; 1 is real text\), \d+ tokens/s', out)


def test_the_options_of_the_guide_as_a_config_file(run, folder):
    (folder / 'mine.py').write_text(GUIDE_CONFIG)
    out = run('python sample.py mine.py --num_samples=1')
    assert texts_of(out) == texts_of(run(
        'python sample.py --checkpoint_name=big_boy2.pt --num_samples=1 --randomness_strength=0.4'))
    (folder / 'schedule.py').write_text(GUIDE_SCHEDULE)
    assert calls_of(run('python sample.py schedule.py --num_samples=1')) == (11, 11)


def test_the_guides_defaults_are_the_defaults_but_for_the_randomness_that_was_measured_best():
    guide = configure(sample.SampleConfig, ['--checkpoint_name=big_boy2.pt'])
    assert (guide.config.iterations, guide.config.start_ratio, guide.config.end_ratio) == (50, 0.95, 0.05)
    assert (guide.config.temperature, guide.config.top_p, guide.config.randomness_strength) == (0.8, 1.0, 0.85)
    assert guide.config.intelligent_remasking and guide.config.remasking_checkpoint_name is None
    assert Path(guide.config.out_dir) == Path('out')
