//! Pings of a Konnectivity agent: Culvert's server bears as many as Konnectivity's, and closes the
//! connection of an agent that sends more in the same way. The agents here are bytes of HTTP/2
//! (RFC 9113).

use std::{io, pin::pin};

use culvert_konnectivity::{
    CONNECT,
    packet::{Packet, Payload},
};
use culvert_loadtest::{
    frontend::{Connection, Protocol},
    targets::Target,
};
use prost::Message as _;
use rstest::rstest;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_rustls::client::TlsStream;

use crate::support::{
    deployment::{
        Deployment,
        Implementation::{self, Culvert, Konnectivity},
        can_run,
    },
    eventually, within,
};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const HEAD_LEN: usize = 9;

const DATA: u8 = 0x0;
const HEADERS: u8 = 0x1;
const SETTINGS: u8 = 0x4;
const PING: u8 = 0x6;
const GOAWAY: u8 = 0x7;
const ACK: u8 = 0x1;
const END_HEADERS: u8 = 0x4;

const TUNNELS_LOST: &str = "culvert_server_tunnels_lost_total{reason=\"too_many_pings\"}";

#[derive(Debug, PartialEq)]
struct Frame {
    kind: u8,
    flags: u8,
    stream: u32,
    payload: Vec<u8>,
}

/// The last frame of a server to an agent that pings too often.
#[derive(Debug, PartialEq)]
struct Goaway {
    last_stream: u32,
    code: u32,
    text: String,
}

fn goaway(last_stream: u32) -> Goaway {
    Goaway { last_stream, code: 0xb, text: "too_many_pings".into() }
}

/// A Konnectivity agent, as a server sees it.
struct RawAgent {
    socket: TlsStream<TcpStream>,
}

impl RawAgent {
    async fn connect(deployment: &Deployment) -> Self {
        let mut agent = Self { socket: deployment.connect_as_konnectivity_agent().await };
        agent.socket.write_all(PREFACE).await.unwrap();
        assert_eq!(agent.fence().await, None);
        agent
    }

    /// Connects and makes the call of an agent.
    async fn join(deployment: &Deployment) -> Self {
        let mut agent = Self::connect(deployment).await;
        // POST and https of HPACK's static table (RFC 7541 appendix A), then names and values.
        let mut fields = vec![0x83, 0x87];
        let named = [
            (":path", CONNECT),
            (":authority", "localhost"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
            ("agentid", "raw"),
        ];
        for (name, value) in named {
            fields.push(0);
            for text in [name, value] {
                fields.push(u8::try_from(text.len()).unwrap());
                fields.extend_from_slice(text.as_bytes());
            }
        }
        agent.send(HEADERS, END_HEADERS, 1, &fields).await;
        agent.until(HEADERS).await;
        deployment.until_joined(1).await;
        agent
    }

    async fn send(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        let frame = [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat();
        self.socket.write_all(&frame).await.unwrap();
        self.socket.flush().await.unwrap();
    }

    async fn receive(&mut self) -> io::Result<Frame> {
        let mut head = [0; HEAD_LEN];
        self.socket.read_exact(&mut head).await?;
        let mut payload = vec![0; usize::from(head[1]) << 8 | usize::from(head[2])];
        self.socket.read_exact(&mut payload).await?;
        let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
        Ok(Frame { kind: head[3], flags: head[4], stream, payload })
    }

    async fn until(&mut self, kind: u8) -> Frame {
        loop {
            match self.receive().await.unwrap() {
                frame if frame.kind == kind => return frame,
                frame => assert_ne!(frame.kind, GOAWAY, "{frame:?}"),
            }
        }
    }

    /// Waits until the server has answered everything so far, or sends GOAWAY.
    async fn fence(&mut self) -> Option<Goaway> {
        self.send(SETTINGS, 0, 0, &[]).await;
        loop {
            let frame = self.receive().await.unwrap();
            match (frame.kind, frame.flags) {
                (SETTINGS, ACK) => return None,
                (GOAWAY, _) => {
                    let (numbers, text) = frame.payload.split_at(8);
                    let (last_stream, code) = numbers.split_at(4);
                    return Some(Goaway {
                        last_stream: u32::from_be_bytes(last_stream.try_into().unwrap()),
                        code: u32::from_be_bytes(code.try_into().unwrap()),
                        text: String::from_utf8(text.to_vec()).unwrap(),
                    });
                }
                _ => {}
            }
        }
    }

    async fn ping(&mut self) -> Option<Goaway> {
        self.send(PING, 0, 0, b"how long").await;
        self.fence().await
    }

    /// Pings until the server sends GOAWAY: the number of pings, and the GOAWAY.
    async fn ping_until_sent_away(&mut self) -> (usize, Goaway) {
        for pings in 1..=100 {
            if let Some(goaway) = self.ping().await {
                return (pings, goaway);
            }
        }
        panic!("the server bears a hundred pings");
    }

    /// Asserts that the server ends the connection and sends nothing more.
    async fn ends(&mut self) {
        let mut more = Vec::new();
        let _ = self.socket.read_to_end(&mut more).await;
        assert!(more.is_empty(), "{more:?}");
    }

    /// The next packet, of one or more frames.
    async fn packet(&mut self) -> Packet {
        let mut bytes = Vec::new();
        loop {
            bytes.extend(self.until(DATA).await.payload);
            if let Some((head, packet)) = bytes.split_first_chunk::<5>()
                && packet.len() == usize::from(head[4])
            {
                return Packet::decode(packet).unwrap();
            }
        }
    }

    async fn send_packet(&mut self, packet: &Packet) {
        let packet = packet.encode_to_vec();
        let length = u32::try_from(packet.len()).unwrap().to_be_bytes();
        self.send(DATA, 0, 1, &[&[0], &length[..], &packet].concat()).await;
    }
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn the_third_ping_too_soon_is_answered_with_goaway(
    #[values(Culvert, Konnectivity)] server: Implementation,
) {
    if !can_run(&[server]).await {
        return;
    }
    within(async {
        let deployment = Deployment::start(server, Protocol::Connect, &[]).await;
        let mut agent = RawAgent::connect(&deployment).await;
        assert_eq!(agent.ping_until_sent_away().await, (4, goaway(0)));
        agent.ends().await;
        let mut agent = RawAgent::join(&deployment).await;
        assert_eq!(agent.ping_until_sent_away().await, (4, goaway(1)));
        agent.ends().await;
    })
    .await;
}

/// As the pings by which grpc-go's client measures bandwidth: one after data.
#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn pings_after_data_of_the_server_are_not_counted(
    #[values(Culvert, Konnectivity)] server: Implementation,
) {
    if !can_run(&[server]).await {
        return;
    }
    within(async {
        let deployment = Deployment::start(server, Protocol::Connect, &[]).await;
        let mut agent = RawAgent::join(&deployment).await;
        for round in 0..20 {
            let mut dial = pin!(deployment.dial("127.0.0.1:9"));
            tokio::select! {
                _ = &mut dial => panic!("the agent has not answered"),
                _ = agent.until(DATA) => {}
            }
            assert_eq!(agent.ping().await, None, "round {round}");
            assert_eq!(agent.ping().await, None, "round {round}");
        }
    })
    .await;
}

/// A Konnectivity agent that receives data measures its bandwidth all the time.
#[tokio::test(flavor = "multi_thread")]
async fn a_busy_konnectivity_agent_is_not_sent_away() {
    const BYTES: u64 = 256 << 20;
    if !can_run(&[Konnectivity]).await {
        return;
    }
    within(async {
        let deployment = Deployment::start(Culvert, Protocol::Connect, &[]).await;
        let _agent = deployment.start_agent(Konnectivity, "agent", &[]).await;
        deployment.until_joined(1).await;
        let target = Target::start(|mut socket| async move {
            tokio::io::copy(&mut (&mut socket).take(BYTES), &mut tokio::io::sink()).await?;
            socket.write_all(b"all").await
        });
        let target = target.await.unwrap();
        let mut upload = deployment.dial(target.address()).await.unwrap();
        let chunk = vec![7; 1 << 20];
        for _ in 0..BYTES / chunk.len() as u64 {
            upload.write(&chunk).await.unwrap();
        }
        assert_eq!(upload.read_count(3).await.unwrap(), b"all");
        assert_eq!(deployment.ready_backends().await, 1.0);
        assert_eq!(deployment.server_metric(TUNNELS_LOST).await, 0.0);
        assert!(!deployment.server_log().contains("agent gone"), "{}", deployment.server_log());
    })
    .await;
}

async fn connected(deployment: &Deployment, agent: &mut RawAgent) -> Connection {
    let answering = async {
        let Some(Payload::DialRequest(request)) = agent.packet().await.payload else {
            panic!("the packet is no dial")
        };
        agent.send_packet(&Packet::dial_response(request.random, Ok(1))).await;
    };
    let (connection, ()) = tokio::join!(deployment.dial("127.0.0.1:9"), answering);
    connection.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_connections_of_an_agent_are_cut_with_the_reason_when_it_is_sent_away() {
    within(async {
        let deployment = Deployment::start(Culvert, Protocol::Grpc, &[]).await;
        let mut agent = RawAgent::join(&deployment).await;
        let mut connection = connected(&deployment, &mut agent).await;
        assert_eq!(agent.ping_until_sent_away().await, (4, goaway(1)));
        // Although the agent has not hung up.
        let error = connection.read_to_end().await.unwrap_err().to_string();
        assert!(error.contains("too_many_pings"), "{error}");
        let counted = async || deployment.server_metric(TUNNELS_LOST).await == 1.0;
        eventually("the loss is counted", counted).await;
        agent.ends().await;
        drop(agent);
        let logged =
            async || deployment.server_log().contains("a Konnectivity agent was sent away");
        eventually("the reason is logged", logged).await;
        assert!(deployment.server_log().contains("the agent pings more often than every 30s"));
        // It may come back.
        let mut agent = RawAgent::join(&deployment).await;
        connected(&deployment, &mut agent).await;
    })
    .await;
}
