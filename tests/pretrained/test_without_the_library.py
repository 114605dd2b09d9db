"""Messages where `transformers` is not installed, or where options do not go with a checkpoint."""

import builtins
from dataclasses import fields

import pytest
import torch

from configurator import configure
from core.common.errors import UserError
from core.pretrained.head_file import HEAD_FIELDS
from core.pretrained.loading import Source, load_pretrained, pretrained_problems
from core.sampling.options import SampleConfig
from model import GPTConfig


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    own_import = builtins.__import__

    def refuse(name, *rest):
        if name.split('.')[0] == 'transformers':
            raise ImportError('No module named transformers')
        return own_import(name, *rest)

    monkeypatch.setattr(builtins, '__import__', refuse)
    with pytest.raises(UserError, match="needs the package transformers .*pip install 'transformers'"):
        load_pretrained(Source(str(tmp_path)), torch.device('cpu'))


def test_options_of_a_pretrained_model_need_one():
    found = configure(SampleConfig, ['--sampler_head=x', '--predicts=next', '--trust_remote_code=True'])
    problems = pretrained_problems(found.config, found.explicit)
    assert len(problems) == 3 and all('applies only with model' in problem for problem in problems)
    assert pretrained_problems(configure(SampleConfig, []).config, {}) == []


def test_a_heads_file_describes_all_that_a_head_is_built_from():
    wanted = {one.name for one in fields(GPTConfig) if one.name.startswith('sampler_')} - {'sampler_gradient'}
    assert wanted <= set(HEAD_FIELDS)
