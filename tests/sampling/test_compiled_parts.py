"""What `--compile=True` compiles on which device. Nothing is compiled here: torch waits for the first call."""

from types import SimpleNamespace

import pytest
import torch

from core.common.timing import TimingAccumulator
from core.sampling.loading import make_network
from core.sampling.options import SampleConfig
from helpers.toys import toy_config
from model import GPT
from sample_utils import draw_wave


@pytest.mark.parametrize('device, compile, waves_compiled', [
    ('cpu', False, False), ('cpu', True, False), ('cuda', False, False), ('cuda', True, True)])
def test_waves_are_compiled_on_a_gpu_only_and_the_trunk_everywhere(device, compile, waves_compiled):
    model = GPT(toy_config(add_sampler_head=True))
    loaded = SimpleNamespace(model=model, device=torch.device(device), remasking_model=None,
                             settings=SimpleNamespace(verify_drafts=False))
    network = make_network(SampleConfig(compile=compile, dtype='float32'), loaded,
                           TimingAccumulator(torch.device('cpu')))
    assert (network.filler('wave').wave is not draw_wave) == waves_compiled
    assert network.compiled == compile
