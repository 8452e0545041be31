// Runs token_merge.h on cases from stdin, so that it can be tested without an engine and under sanitizers.
//
// A case: ten uint64 (N, C, D, H, r, protected, keep_order, half, parts, fused), then x [N, C], size [N] and metric
// [N, H, D] in float32, and if fused addend [N, C], weight [C] and bias [C]; with `half`, x, addend and metric are rounded
// to bfloat16 first. Answers merged [N - r, C] and sizes [N - r] in float32, if fused the layer norm of merged and the
// logarithms of the sizes, then src, dst and unm in int64. The rows are merged in `parts` calls, as threads would.
#include <cstdio>
#include <vector>

#include "token_merge.h"

namespace {

template <class T> bool read(std::vector<T>& into) {
    return std::fread(into.data(), sizeof(T), into.size(), stdin) == into.size();
}

template <class T> void write(const std::vector<T>& from) {
    if (!from.empty()) {
        std::fwrite(from.data(), sizeof(T), from.size(), stdout);
    }
}

template <class T> std::vector<T> stored(const std::vector<float>& values) {
    std::vector<T> out(values.size());
    for (std::size_t i = 0; i < values.size(); ++i) {
        tocom::narrow(values[i], out[i]);
    }
    return out;
}

template <class T> std::vector<float> wide(const std::vector<T>& values) {
    std::vector<float> out(values.size());
    for (std::size_t i = 0; i < values.size(); ++i) {
        out[i] = tocom::widen(values[i]);
    }
    return out;
}

struct Case {
    tocom::MergeShape shape;
    std::size_t parts;
    bool fused;
    std::vector<float> x, size, metric, addend, weight, bias;
};

template <class T> void run(const Case& given) {
    static tocom::Merger merger; // one for all cases: what an earlier one left behind must not matter
    const auto& shape = given.shape;
    const auto x = stored<T>(given.x), metric = stored<T>(given.metric), addend = stored<T>(given.addend);
    std::vector<T> merged(shape.remaining() * shape.channels), normed(merged.size()), logs(shape.remaining());
    std::vector<float> sizes(shape.remaining());
    std::vector<std::int64_t> src(shape.removed), dst(shape.removed), unm(shape.unmerged());
    const tocom::Decisions decisions{src.data(), dst.data(), unm.data()};
    const tocom::Tokens<T> tokens{x.data(), given.fused ? addend.data() : nullptr, given.size.data()};
    const tocom::LayerNorm norm{given.fused ? given.weight.data() : nullptr, given.bias.data(), 1e-6f};
    merger.match(shape, metric.data(), decisions);
    for (std::size_t part = 0; part < given.parts; ++part) {
        merger.merge(shape, tokens, norm, decisions, shape.remaining() * part / given.parts,
                     shape.remaining() * (part + 1) / given.parts,
                     tocom::Merged<T>{merged.data(), sizes.data(), given.fused ? normed.data() : nullptr,
                                      given.fused ? logs.data() : nullptr});
    }
    write(wide(merged));
    write(sizes);
    if (given.fused) {
        write(wide(normed));
        write(wide(logs));
    }
    write(src);
    write(dst);
    write(unm);
}

} // namespace

int main() {
    std::vector<std::uint64_t> header(10);
    while (read(header)) {
        Case given{{header[0], header[1], header[2], header[3], header[4], header[5], header[6] != 0}, header[8],
                   header[9] != 0, {}, {}, {}, {}, {}, {}};
        const auto& shape = given.shape;
        if (!shape.valid()) {
            return 2;
        }
        given.x.resize(shape.tokens * shape.channels);
        given.size.resize(shape.tokens);
        given.metric.resize(shape.heads * shape.tokens * shape.metric);
        given.addend.resize(given.fused ? given.x.size() : 0);
        given.weight.resize(given.fused ? shape.channels : 0);
        given.bias.resize(given.weight.size());
        if (!read(given.x) || !read(given.size) || !read(given.metric) || !read(given.addend) || !read(given.weight) ||
            !read(given.bias)) {
            return 3;
        }
        const auto run_case = header[7] ? run<tocom::bf16> : run<float>;
        run_case(given);
    }
    return 0;
}
