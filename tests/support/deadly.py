"""A message that kills the process which decodes it, as an error in a C library would."""

# Python runs it at its start: decoding a message with a certain text reads address zero.
DEADLY = """
import ctypes, json, time
loads = json.loads
def deadly(value, *more, **named):
    if b"DEADLY" in bytes(value, "utf-8") if isinstance(value, str) else b"DEADLY" in value:
        ctypes.string_at(0)
    if (b"SLOW" in value) if isinstance(value, bytes) else False:
        print("decoding", flush=True)
        time.sleep(3600)
    return loads(value, *more, **named)
json.loads = deadly
"""
