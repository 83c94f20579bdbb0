"""Training steps, ours and plain ones, on generated texts and random weights: what time goes to."""

import logging

# When it loads it looks for a compiled CPU kernel, and on some processors says that there is none.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
