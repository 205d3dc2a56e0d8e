"""Masked AdamW in one pass over the bytes that must move, for all parameters of a block in one launch.

The arithmetic is that of ``reference.masked_adamw_step``. Bytes a weight, beside the mask's eighth: parameter read and written,
gradient read (and written if it is zeroed), states read and written: 28 with float32 everything, of which compact states
move only the kept share.

Many tensors, one launch: a table of pointers (a row a parameter) and a list of pieces (parameter, where in it) lie in device
memory; a program loads its piece, and from the table the pointers that it works with.

    piece -> (parameter, first row, first column) -> pointers of that parameter
             a stretch of one row, BLOCK weights: BLOCK / 32 mask words, their bits, and with compact states the stored
             index of each weight = row offset + kept weights before it in the row

8-bit moments need the largest of 256 *stored* entries before the first code can be written. Dense: a piece is whole blocks of 256.
Compact: a piece is one block of 256 stored entries, which stretch over as many weights as it takes; the program walks over that
stretch twice, once for the largest value and once to write, and the second time everything comes from the cache.
"""
