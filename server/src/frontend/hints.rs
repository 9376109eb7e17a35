//! Hints that a frontend's request carries beside its target.

use culvert_wire::dial::{StreamKind, TraceContext};

/// Header or gRPC metadata that names the purpose of a connection; kube-apiserver sends none.
const KIND_HEADER: &str = "culvert-kind";

/// Hints of one request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct RequestHints {
    pub(super) kind: StreamKind,
    pub(super) trace: Option<TraceContext>,
}

impl RequestHints {
    /// Reads the headers that `header` finds by their lower-case names.
    pub(super) fn read<'a>(header: impl Fn(&str) -> Option<&'a str>) -> Self {
        let trace = header("traceparent").and_then(|traceparent| {
            Some(TraceContext {
                traceparent: traceparent.try_into().ok()?,
                tracestate: header("tracestate").unwrap_or_default().try_into().ok()?,
            })
        });
        let kind = header(KIND_HEADER).map_or(StreamKind::UNKNOWN, StreamKind::from_name);
        Self { kind, trace }
    }
}
