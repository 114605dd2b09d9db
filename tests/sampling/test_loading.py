"""From options and files to what generation takes: prompts, and checkpoints that may not be sampled from."""

import pytest

from configurator import configure
from core.common.errors import UserError
from core.sampling import loading
from core.sampling.loading import prompt_text
from core.sampling.options import SampleConfig
from core.sampling.policy_options import option_problems
from helpers.sampling import sample, write_checkpoint


@pytest.mark.parametrize('given, meant', [
    ('ab', 'ab'), ('', ''), (r'a\nb', 'a\nb'), (r'a\\nb', r'a\nb'), (r'\n\n', '\n\n'), (r'\\n\n', '\\n\n'),
    (r'C:\temp \d', r'C:\temp \d'), ('a\nb', 'a\nb'), ('a@b', 'a@b'), ('@@ab', '@ab'), ('@@@', '@@')])
def test_what_a_prompt_means(given, meant):
    assert prompt_text('start_text', given) == meant


@pytest.mark.parametrize('held, meant', [
    (b'two\nlines\n', 'two\nlines'), (b'one\n\n', 'one\n'), (b'', ''), (b'\xef\xbb\xbfa\r\nb\r\n', 'a\nb'),
    (b'literal \\n @x', r'literal \n @x')])
def test_a_prompt_from_a_file(tmp_path, held, meant):
    (tmp_path / 'prompt.txt').write_bytes(held)
    assert prompt_text('start_text', f'@{tmp_path}/prompt.txt') == meant


def test_a_prompt_file_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / 'latin').write_bytes(b'\xe9')
    (tmp_path / 'long').write_text('abc')
    monkeypatch.setattr(loading, 'LONGEST_PROMPT', 2)
    for name, words in (('none', 'No such file'), ('latin', 'not UTF-8'), ('', 'directory'), ('long', 'more than 2')):
        with pytest.raises(UserError, match=f'infill_text is @.*{words}.*write @@'):
            prompt_text('infill_text', f'@{tmp_path}/{name}')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('run')
    write_checkpoint(folder / 'ckpt_best.pt', add_critic_head=True)
    write_checkpoint(folder / 'broken.pt', broken='transformer.wte.weight')
    write_checkpoint(folder / 'broken_critic.pt', broken='critic_head.weight', add_critic_head=True)
    write_checkpoint(folder / 'broken_remasking.pt', kind='remasking', broken='transformer.wte.weight',
                     wrong_token_id=11)
    write_checkpoint(folder / 'broken_judge.pt', kind='judge', mode='sequence_scorer', block_size=17, cls_token_id=12,
                     broken='transformer.wte.weight')
    return folder


def test_prompts_reach_the_texts(folder, tmp_path):
    (tmp_path / 'prompt.txt').write_text('ab\ncd\n')
    for arguments in ([f'--start_text=@{tmp_path}/prompt.txt'], [r'--start_text=ab\ncd'],
                      [r'--infill_text=ab\ncd__', '--sequence_length=16']):
        made, _ = sample(folder, '--iterations=2', '--num_samples=2', *arguments)
        assert all(text.startswith('ab\ncd') and len(text) == 16 for text in made.texts)
    with pytest.raises(UserError, match="1 kind of character outside the corpus vocabulary of 10: 'é'"):
        sample(folder, '--start_text=é')


@pytest.mark.parametrize('arguments, words', [
    (['--checkpoint_name=broken.pt'], "kind 'unmasking' has weights that are not numbers .*wte"),
    (['--checkpoint_name=broken_critic.pt'], "kind 'unmasking' .*critic_head"),
    (['--remasking_checkpoint_name=broken_remasking.pt'], "kind 'remasking' .*wte"),
    (['--quality_metric=judge', '--judge_checkpoint_name=broken_judge.pt'], "kind 'judge' .*wte")])
def test_weights_that_are_not_numbers_are_refused(folder, arguments, words):
    with pytest.raises(UserError, match=words):
        sample(folder, '--iterations=2', *arguments)


def test_top_k_of_0_is_off(folder):
    texts = [sample(folder, '--iterations=2', '--num_samples=2', *arguments)[0].texts
             for arguments in ([], ['--top_k=0'], ['--top_k=1'])]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize('option, most', [('num_samples', 2 ** 32), ('iterations', 10 ** 6), ('top_k', 2 ** 32),
                                          ('sequence_length', 10 ** 6), ('batch_size', 2 ** 32)])
def test_counts_have_limits(option, most):
    def found(value):
        configuration = configure(SampleConfig, [f'--{option}={value}'])
        return option_problems(configuration.config, configuration.explicit)

    assert found(most) == [] and found(most + 1) == [f'{option} is {most + 1}, but must be at most {most:,}']
    assert len(found(-1)) == 1
