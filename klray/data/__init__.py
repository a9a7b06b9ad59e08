"""Images: where they come from, and the stream of them on the device."""
