// Which torch the extension was built for, in words that fastlstm/backends/native.py finds in the file before
// it loads it: torch's C++ interface changes from version to version, and a library built for another one can
// fail to load, or load and crash.
#if !defined(FASTLSTM_BUILT_FOR)
#error "setup.py defines FASTLSTM_BUILT_FOR"
#endif

extern "C" __attribute__((used, visibility("default"))) const char fastlstm_built_for[] =
    "fastlstm._C was built for torch " FASTLSTM_BUILT_FOR;
