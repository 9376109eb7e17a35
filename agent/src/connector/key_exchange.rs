//! A second handshake with a smaller ClientHello, where the first one gets no answer.
//!
//! With ML-KEM a ClientHello takes two packets. Some firewalls and routers decide on the first
//! packet, and reset or drop what they cannot parse.

use std::{io::ErrorKind, pin::pin, time::Duration};

use culvert_process::rate_limited;
use culvert_transport::{ConnectError, TransportFault, TunnelLost};
use tokio::{select, time::sleep};

use crate::connector::error::CarrierError;

/// Time for an answer to the first ClientHello. It is longer than a handshake whose packets are lost
/// once, and leaves the second one enough of the time of an attempt.
const ANSWER_TIME: Duration = Duration::from_secs(3);

/// The result of `first`; if it gets no answer, that of `smaller`. Both run until one succeeds. The
/// error is that of `first`.
///
/// # Cancel safety
/// Cancel safe if both are.
pub(super) async fn with_smaller_hello<T>(
    first: impl Future<Output = Result<T, CarrierError>>,
    smaller: impl Future<Output = Result<T, CarrierError>>,
) -> Result<T, CarrierError> {
    let (mut first, mut smaller) = (pin!(first), pin!(smaller));
    let failed = select! {
        biased;
        ended = &mut first => match ended {
            Err(error) if is_unanswered(&error) => Some(error),
            ended => return ended,
        },
        () = sleep(ANSWER_TIME) => None,
    };
    let Some(error) = failed else {
        return select! {
            biased;
            ended = &mut first => match ended {
                Err(error) if is_unanswered(&error) => or_error(smaller.await, error),
                ended => ended,
            },
            ended = &mut smaller => match ended {
                Ok(connected) => or_error(Ok(connected), CarrierError::UnknownAddress),
                Err(_) => first.await,
            },
        };
    };
    or_error(smaller.await, error)
}

/// The result of the smaller ClientHello if it is good, or the error of the first one.
fn or_error<T>(smaller: Result<T, CarrierError>, error: CarrierError) -> Result<T, CarrierError> {
    let connected = smaller.map_err(|_| error)?;
    rate_limited!(
        Duration::from_secs(600),
        WARN,
        "a handshake succeeds only with a classical key exchange; see --tls-key-exchange"
    );
    Ok(connected)
}

/// Whether the peer, or what is in front of it, gave no answer that names a fault.
fn is_unanswered(error: &CarrierError) -> bool {
    let CarrierError::Connect(ConnectError::Handshake(lost)) = error else {
        return matches!(error, CarrierError::TimedOut(_));
    };
    match lost {
        TunnelLost::TimedOut | TunnelLost::Transport(TransportFault::Ended) => true,
        TunnelLost::Transport(TransportFault::Io(fault)) => matches!(
            fault.kind,
            ErrorKind::ConnectionReset
                | ErrorKind::ConnectionAborted
                | ErrorKind::BrokenPipe
                | ErrorKind::UnexpectedEof
        ),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::{future::pending, io};

    use tokio::time::Instant;

    use super::*;

    type Outcome = Result<&'static str, CarrierError>;

    fn reset() -> CarrierError {
        let fault = TransportFault::from(io::Error::from(ErrorKind::ConnectionReset));
        CarrierError::Connect(fault.into())
    }

    fn refused() -> CarrierError {
        CarrierError::Connect(ConnectError::Refused)
    }

    async fn after(seconds: u64, outcome: Outcome) -> Outcome {
        sleep(Duration::from_secs(seconds)).await;
        outcome
    }

    #[tokio::test(start_paused = true)]
    async fn a_reset_of_the_first_hello_leads_to_a_smaller_one_at_once() {
        let start = Instant::now();
        let found = with_smaller_hello(after(0, Err(reset())), after(1, Ok("smaller"))).await;
        assert_eq!((found.unwrap(), start.elapsed()), ("smaller", Duration::from_secs(1)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_first_hello_without_an_answer_leads_to_a_smaller_one_beside_it() {
        let start = Instant::now();
        let found = with_smaller_hello(pending(), after(1, Ok("smaller"))).await;
        assert_eq!((found.unwrap(), start.elapsed()), ("smaller", Duration::from_secs(4)));
        let found = with_smaller_hello(after(5, Ok("first")), pending()).await;
        assert_eq!(found.unwrap(), "first");
        let found = with_smaller_hello(after(5, Ok("first")), after(1, Err(reset()))).await;
        assert_eq!(found.unwrap(), "first");
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_names_a_fault_leads_to_no_second_hello() {
        let unexpected = async { panic!("a second hello") };
        let found: Outcome = with_smaller_hello(after(1, Err(refused())), unexpected).await;
        assert!(matches!(found, Err(CarrierError::Connect(ConnectError::Refused))));
    }

    #[tokio::test(start_paused = true)]
    async fn the_error_of_the_first_hello_is_reported() {
        for smaller in [after(0, Err(refused())), after(9, Err(refused()))] {
            let found = with_smaller_hello(after(5, Err(reset())), smaller).await;
            let error = found.unwrap_err();
            assert!(is_unanswered(&error), "{error}");
        }
    }
}
