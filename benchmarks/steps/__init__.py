"""Training steps of ours and of plain code, on generated texts and random weights, to see where time goes."""

import logging

# When it loads, it looks for a compiled CPU kernel. On some processors it prints that there is none.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
