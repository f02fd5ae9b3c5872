"""``python -m data_pipeline.shapes --out DIR --clips 2000 --images 400`` writes the shapes data set."""

from opensora.utils import signal_handler

if __name__ == "__main__":  # before torch is imported, which takes long enough to be interrupted in
    signal_handler.listen_early()

import sys

from data_pipeline.shapes.write import main
from opensora.utils.signal_handler import stopped_in_one_line

if __name__ == "__main__":
    with stopped_in_one_line("the same command writes the data set anew"):
        sys.exit(main())
