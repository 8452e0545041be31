// Runs token_merge.h on cases from stdin, so that it can be tested without an engine and under sanitizers.
//
// A case: nine uint64 (N, C, D, H, r, protected, keep_order, half, parts), then x [N, C], size [N] and metric [N, H, D]
// in float32; with `half`, x and metric are rounded to bfloat16 first. Answers merged [N - r, C] and sizes [N - r] in
// float32, then src, dst and unm in int64. The rows are merged in `parts` calls, as threads would.
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

template <class T>
void run(const tocom::MergeShape& shape, std::size_t parts, const std::vector<float>& wide_x,
         const std::vector<float>& size, const std::vector<float>& wide_metric) {
    static tocom::Merger merger; // one for all cases: what an earlier one left behind must not matter
    const auto x = stored<T>(wide_x), metric = stored<T>(wide_metric);
    std::vector<T> merged(shape.remaining() * shape.channels);
    std::vector<float> sizes(shape.remaining());
    std::vector<std::int64_t> src(shape.removed), dst(shape.removed), unm(shape.unmerged());
    const tocom::Decisions decisions{src.data(), dst.data(), unm.data()};
    merger.match(shape, metric.data(), decisions);
    for (std::size_t part = 0; part < parts; ++part) {
        merger.merge(shape, x.data(), size.data(), decisions, shape.remaining() * part / parts,
                     shape.remaining() * (part + 1) / parts, merged.data(), sizes.data());
    }
    std::vector<float> wide(merged.size());
    for (std::size_t i = 0; i < merged.size(); ++i) {
        wide[i] = tocom::widen(merged[i]);
    }
    write(wide);
    write(sizes);
    write(src);
    write(dst);
    write(unm);
}

} // namespace

int main() {
    std::vector<std::uint64_t> header(9);
    while (read(header)) {
        const tocom::MergeShape shape{header[0], header[1], header[2], header[3], header[4], header[5], header[6] != 0};
        if (!shape.valid()) {
            return 2;
        }
        std::vector<float> x(shape.tokens * shape.channels), size(shape.tokens);
        std::vector<float> metric(shape.heads * shape.tokens * shape.metric);
        if (!read(x) || !read(size) || !read(metric)) {
            return 3;
        }
        const auto run_case = header[7] ? run<tocom::bf16> : run<float>;
        run_case(shape, header[8], x, size, metric);
    }
    return 0;
}
