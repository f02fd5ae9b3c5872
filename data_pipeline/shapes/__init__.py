"""A data set drawn on the spot: captioned clips and stills of one moving coloured shape.

``render`` draws and writes it (``python -m data_pipeline.shapes --out DIR``), ``judge`` decides from pixels alone what
a clip shows (``python -m data_pipeline.shapes.judge FOLDER --table TABLE``) and shares nothing with the renderer.
"""
