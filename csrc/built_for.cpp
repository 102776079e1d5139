// The torch version the extension was built for. fastlstm/backends/native.py searches the file for this
// string before loading it: torch's C++ ABI changes between versions, and a library built for another version
// may fail to load, or load and crash.
#if !defined(FASTLSTM_BUILT_FOR)
#error "setup.py defines FASTLSTM_BUILT_FOR"
#endif

extern "C" __attribute__((used, visibility("default"))) const char fastlstm_built_for[] =
    "fastlstm._C was built for torch " FASTLSTM_BUILT_FOR;
