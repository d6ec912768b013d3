"""What proves the gfx1151 machine code: the table of the code object, the emulator, the fragment maps."""
