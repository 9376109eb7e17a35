//! How each peer looks in every picture.

/// A peer's colour and dash pattern. Colours are those of Okabe and Ito, which differ for the
/// colour-blind too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Look {
    pub(super) colour: &'static str,
    /// The value of SVG's `stroke-dasharray`; empty for a solid line.
    pub(super) dash: &'static str,
}

impl Look {
    /// The opacity of a bar, which has no dashes: less where lines are dotted.
    pub(super) fn opacity(self) -> f64 {
        if self.dash == DOTTED { 0.55 } else { 1.0 }
    }
}

const DOTTED: &str = "2 3";

const LOOKS: [(&str, Look); 10] = [
    ("culvert-grpc", Look { colour: "#0072b2", dash: "" }),
    ("culvert-grpc-bbr", Look { colour: "#0072b2", dash: DOTTED }),
    ("culvert-connect", Look { colour: "#56b4e9", dash: "6 2" }),
    ("culvert-connect-bbr", Look { colour: "#56b4e9", dash: DOTTED }),
    ("konnectivity-grpc", Look { colour: "#d55e00", dash: "" }),
    ("konnectivity-grpc-bbr", Look { colour: "#d55e00", dash: DOTTED }),
    ("konnectivity-connect", Look { colour: "#e69f00", dash: "6 2" }),
    ("konnectivity-connect-bbr", Look { colour: "#e69f00", dash: DOTTED }),
    ("direct", Look { colour: "#009e73", dash: "" }),
    ("direct-bbr", Look { colour: "#009e73", dash: DOTTED }),
];
const OTHER: Look = Look { colour: "#cc79a7", dash: "1 2" };

/// The look of a peer by its name.
pub(super) fn look(peer: &str) -> Look {
    LOOKS.iter().find(|(name, _)| *name == peer).map_or(OTHER, |(_, look)| *look)
}
