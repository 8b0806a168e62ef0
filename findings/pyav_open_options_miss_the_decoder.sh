#!/usr/bin/env bash
# PyAV 18.1.0: av.open(file, options=...) is documented as "Options to pass to the container and all streams", and
# stream_options as those "to pass to each stream". Neither reaches a stream's decoder, and no error says so. An
# option of a decoder, here lowres=1 of mjpeg (decode at half size), works only where it is set on
# stream.codec_context.options before the first frame is decoded.
#
# Output seen on 2026-11-29, Python 3.11, x86-64 Linux:
#   PyAV 18.1.0
#   no option 64 x 64
#   open(options) 64 x 64
#   open(stream_options) 64 x 64
#   codec_context.options 32 x 32
# Exits non-zero where that is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q av==18.1.0 numpy==2.4.6
cat > "$folder/show.py" <<'PY'
import sys

import av
import numpy as np

path, option = sys.argv[1], {"lowres": "1"}
with av.open(path, "w") as file:
    stream = file.add_stream("mjpeg", rate=8)
    stream.width = stream.height = 64
    stream.pix_fmt = "yuvj420p"
    for i in range(4):
        picture = np.full((64, 64, 3), 10 * i, np.uint8)
        file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
    file.mux(stream.encode())


def side(codec=None, **opened):
    with av.open(path, **opened) as file:
        stream = file.streams.video[0]
        if codec:
            stream.codec_context.options = codec
        return next(file.decode(stream)).width


found = {"no option": side(), "open(options)": side(options=option),
         "open(stream_options)": side(stream_options=[option]), "codec_context.options": side(codec=option)}
print(f"PyAV {av.__version__}")
for name, width in found.items():
    print(f"{name} {width} x {width}")
sys.exit(list(found.values()) != [64, 64, 64, 32])
PY
"$folder/env/bin/python" "$folder/show.py" "$folder/clip.avi"
