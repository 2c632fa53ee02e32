"""What trained runs are for: their networks, read from a checkpoint by as many ranks as one likes."""

import nlscale.runtime.world  # noqa: F401  # before anything else brings megatron-core in, which it keeps from compiling
