//! Why a stream or a tunnel ended: the closed tables of codes that cross the wire.

use std::fmt;

/// Defines a newtype over a code with one row per known value: constant, number, name, meaning.
macro_rules! codes {
    (
        $(#[$outer:meta])*
        $name:ident {
            $($(#[$doc:meta])* $constant:ident = $value:literal, $text:literal;)+
        }
    ) => {
        $(#[$outer])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash)]
        pub struct $name(u32);

        impl $name {
            $($(#[$doc])* pub const $constant: Self = Self($value);)+

            /// Every code this build can name, in ascending order.
            pub const ALL: &'static [Self] = &[$(Self::$constant),+];

            /// The code with this number; a number without a row is kept as it is.
            pub const fn from_u32(value: u32) -> Self {
                Self(value)
            }

            /// The number that crosses the wire.
            pub const fn as_u32(self) -> u32 {
                self.0
            }

            /// The code's short name for logs and metric labels; `unknown` without a row.
            pub const fn name(self) -> &'static str {
                match self.0 {
                    $($value => $text,)+
                    _ => "unknown",
                }
            }

            /// The code that a QUIC application error number stands for.
            ///
            /// Numbers beyond 32 bits have no row and become `u32::MAX`.
            pub fn from_wire(value: u64) -> Self {
                Self(u32::try_from(value).unwrap_or(u32::MAX))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self.name() {
                    "unknown" => write!(f, "unknown code {:#x}", self.0),
                    name => f.write_str(name),
                }
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({:#x}, {})", stringify!($name), self.0, self.name())
            }
        }
    };
}

codes! {
    /// Why one half of a stream was reset or stopped (RFC 9000 §19.4, §19.5).
    //= docs/protocol.md#7-stream-codes
    StreamCode {
        /// The owner of the half went away without a reason: a task ended early or crashed.
        ABANDONED = 0x00, "abandoned";
        /// The other side of the splice was closed in an orderly way and reads no more.
        CLOSED = 0x01, "closed";
        /// The TCP peer on the other side reset its connection.
        PEER_RESET = 0x02, "peer_reset";
        /// The TCP peer on the other side refuses to read.
        BROKEN_PIPE = 0x03, "broken_pipe";
        /// The TCP peer on the other side failed for another reason.
        IO_ERROR = 0x04, "io_error";
        /// The frontend gave up: its request was cancelled or its connection was lost.
        CANCELLED = 0x05, "cancelled";
        /// The dial was not answered in time.
        DIAL_TIMEOUT = 0x06, "dial_timeout";
        /// The dial failed; the dial reply says why.
        DIAL_FAILED = 0x07, "dial_failed";
        /// The head of the stream could not be read as a dial or a dial reply.
        MALFORMED = 0x08, "malformed";
        /// A limit of the refusing side is reached.
        OVERLOADED = 0x09, "overloaded";
        /// The refusing side takes no new dials because it is going away.
        DRAINING = 0x0a, "draining";
        /// The tunnel that carried the other half was lost.
        TUNNEL_LOST = 0x0b, "tunnel_lost";
        /// The process stopped before the stream had ended.
        SHUTDOWN = 0x0c, "shutdown";
        /// The frontend broke the rules of its own protocol.
        FRONTEND_MISBEHAVED = 0x0d, "frontend_misbehaved";
    }
}

codes! {
    /// Why a tunnel was closed (RFC 9000 §19.19).
    //= docs/protocol.md#8-close-codes
    CloseCode {
        /// No fault: the side that closes is done.
        DONE = 0x00, "done";
        /// The process that closes stops.
        SHUTDOWN = 0x01, "shutdown";
        /// The peer broke the protocol.
        PROTOCOL_VIOLATION = 0x02, "protocol_violation";
        /// The peers have no common ground: revision, feature or extension.
        INCOMPATIBLE = 0x03, "incompatible";
        /// The peer's proof of identity was refused.
        UNAUTHENTICATED = 0x04, "unauthenticated";
        /// The peer did not answer on the control stream in time.
        UNRESPONSIVE = 0x05, "unresponsive";
        /// A limit of the closing side is reached.
        OVERLOADED = 0x06, "overloaded";
        /// A newer tunnel of the same process replaces this one.
        SUPERSEDED = 0x07, "superseded";
        /// The owner of the tunnel went away without a reason.
        ABANDONED = 0x08, "abandoned";
        /// The peer pings more often than it may.
        TOO_MANY_PINGS = 0x09, "too_many_pings";
        /// An operator of the closing side sent the peer away.
        EVICTED = 0x0a, "evicted";
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_row_has_its_own_number_and_name() {
        for (index, code) in StreamCode::ALL.iter().enumerate() {
            assert_eq!(code.as_u32() as usize, index, "{code}");
            assert_ne!(code.name(), "unknown");
        }
        for (index, code) in CloseCode::ALL.iter().enumerate() {
            assert_eq!(code.as_u32() as usize, index, "{code}");
            assert_ne!(code.name(), "unknown");
        }
    }

    #[test]
    fn a_number_without_a_row_is_kept_and_shown() {
        let code = StreamCode::from_wire(0xbeef);
        assert_eq!(code.as_u32(), 0xbeef);
        assert_eq!(code.name(), "unknown");
        assert_eq!(code.to_string(), "unknown code 0xbeef");
        assert_eq!(CloseCode::from_wire(u64::MAX).as_u32(), u32::MAX);
    }
}
