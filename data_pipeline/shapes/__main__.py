"""``python -m data_pipeline.shapes --out DIR --clips 2000 --images 400`` writes the shapes data set."""

import sys

from data_pipeline.shapes.write import main

if __name__ == "__main__":
    sys.exit(main())
