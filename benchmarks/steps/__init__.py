"""Steps of training, ours and plain, as the benchmarks of a GPU take them."""

import logging

# Loaded for the first time it looks for a compiled CPU kernel, and on some processors says that there is none.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
