"""The benchmark's count of operations against torch's."""
import pytest
from benchmark import flops

import musicldm

# torch 2.13.0's FlopCounterMode around the published architecture in diffusers 0.33.1 and transformers 4.57.1, on the
# device "meta", where it sees attention's products too: a text of 32 tokens, the UNet for a batch of 2, and the rest
COUNTED = {10.24: {"prompt": 5476057088, "unet": 206786265088, "vae": 670468407296, "vocoder": 1027036035072},
           0.44: {"prompt": 5476057088, "unet": 8959852544, "vae": 27396233216, "vocoder": 44319004672}}


@pytest.mark.parametrize("seconds", COUNTED)
def test_flops_of_the_published_architecture(seconds):
    assert flops(musicldm.load_config(weights="random"), seconds, [32]) == COUNTED[seconds]
