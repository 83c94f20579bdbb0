"""Training steps, ours and plain ones, on generated texts and random weights: what time goes to."""

import logging

# Loaded for the first time, it looks for a compiled CPU kernel; on some processors it says that there is none.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
