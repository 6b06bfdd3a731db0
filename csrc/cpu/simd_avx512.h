// The AVX-512 intrinsics, for the *_avx512.cpp files.
#pragma once

// GCC 12 takes the "undefined" operands inside its own intrinsics for uninitialised variables (bug 105593); the pragma
// has to last to the end of the file that uses them.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
