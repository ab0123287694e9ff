// The load generator of the benchmarks, and the agent behind the proxies: one small program, so that every case is driven by
// the same code. `load serve` is the agent; `load drive` reads a plan (JSON, one line) from standard input, opens its
// connections, warms up, says so (a line), waits for a line, loads, and says what came of it (a line).
//
// It parses no more of HTTP than the answers to its own requests need, since it shares the machine with what it measures. It
// does verify what it is told: that the server proves the SPIFFE ID that the plan names, and that each answer is a 2xx of the
// length that was asked for. What is not is counted by its reason, and whoever reads the result judges it.
package main

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// plan is one stretch of load. Sizes are in bytes, times in seconds.
type plan struct {
	Address  string `json:"address"`
	Cert     string `json:"cert"` // empty: plain HTTP
	Key      string `json:"key"`
	Anchors  string `json:"anchors"`
	Server   string `json:"server"`   // the SPIFFE ID that the server has to prove
	Protocol string `json:"protocol"` // h1, h2
	Shape    string `json:"shape"`    // keep: on kept connections; fresh: each on its own; handshake: no request; events: SSE
	Method   string `json:"method"`
	Path     string `json:"path"`
	// How many paths there are: 1 takes Path as it is, n takes turns with n below it, 0 never the same twice.
	Paths       int     `json:"paths"`
	Body        int     `json:"body"`
	Answer      int     `json:"answer"` // length of the body of each answer; of SSE, how many events
	GRPC        bool    `json:"grpc"`
	Connections int     `json:"connections"`
	Streams     int     `json:"streams"` // at once on each connection, HTTP/2
	Idle        int     `json:"idle"`    // connections that are opened beside, ask once and then wait
	Rate        float64 `json:"rate"`    // requests per second in all, at random moments; 0 as fast as it goes
	WarmUp      float64 `json:"warm_up"`
	Seconds     float64 `json:"seconds"`
}

// result is what was seen between the go and the last answer. Units are requests, or events of SSE, or handshakes.
type result struct {
	Answers  int            `json:"answers"` // whole answers as wanted
	Units    int            `json:"units"`
	Warm     int            `json:"warm"`     // answers before the go
	Opened   int            `json:"opened"`   // connections in all
	Reopened int            `json:"reopened"` // of these, in place of one that the server had ended
	Seconds  float64        `json:"seconds"`
	P50      float64        `json:"p50_ms"`
	P90      float64        `json:"p90_ms"`
	P99      float64        `json:"p99_ms"`
	P999     float64        `json:"p999_ms"`
	Wrong    map[string]int `json:"wrong"` // by reason; the warm-up's too
}

// tally is what one worker has seen; nobody else writes to it.
type tally struct {
	answers, units, reopened int
	latencies                []int64 // nanoseconds
	wrong                    map[string]int
}

func (t *tally) took(d time.Duration) { t.latencies = append(t.latencies, int64(d)) }

func (t *tally) failed(reason string) {
	if t.wrong == nil {
		t.wrong = map[string]int{}
	}
	t.wrong[reason]++
}

// worker loads one connection, or one after the other, until a moment; what it has begun it finishes.
type worker interface {
	run(start, until time.Time, t *tally)
}

const patience = 10 * time.Second

// counter numbers paths that must be new, over all runs of all processes: none asks a million times a second.
var counter atomic.Int64

var opened atomic.Int64

func (p *plan) path(buffer []byte) []byte {
	buffer = append(buffer, p.Path...)
	switch p.Paths {
	case 0:
		buffer = fmt.Appendf(buffer, "/%016d", counter.Add(1))
	case 1:
	default:
		buffer = fmt.Appendf(buffer, "/%04d", counter.Add(1)%int64(p.Paths))
	}
	return buffer
}

func main() {
	if len(os.Args) == 5 && os.Args[1] == "serve" {
		fail(serve(os.Args[2], os.Args[3], os.Args[4]))
	}
	if len(os.Args) == 2 && os.Args[1] == "drive" {
		fail(drive())
		return
	}
	fail(errors.New("usage: load serve ADDRESS:PORT CALLER EVENTS/MILLISECONDS | load drive"))
}

func fail(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "load:", err)
		os.Exit(1)
	}
}

func drive() error {
	counter.Store(time.Now().UnixMicro())
	input := bufio.NewReader(os.Stdin)
	line, err := input.ReadBytes('\n')
	if err != nil {
		return err
	}
	var p plan
	if err := json.Unmarshal(line, &p); err != nil {
		return err
	}
	d, err := newDialer(&p)
	if err != nil {
		return err
	}
	workers, idle, err := open(&p, d)
	if err != nil {
		return err
	}
	defer func() {
		for _, one := range idle {
			_ = one.conn.Close()
		}
	}()
	warm := load(workers, p.WarmUp)
	for _, one := range idle { // each of them has been used once
		one.once(&warm.sum)
	}
	fmt.Println("{}")
	if _, err := input.ReadBytes('\n'); err != nil {
		return err
	}
	main := load(workers, p.Seconds)
	r := main.result()
	r.Warm, r.Opened = warm.sum.answers, int(opened.Load())
	r.Reopened += warm.sum.reopened
	for reason, count := range warm.sum.wrong {
		r.Wrong[reason] += count
	}
	return json.NewEncoder(os.Stdout).Encode(r)
}

func open(p *plan, d *dialer) ([]worker, []*h1, error) {
	workers := make([]worker, p.Connections)
	for i := range workers {
		switch {
		case p.Shape == "fresh" || p.Shape == "handshake":
			workers[i] = &fresh{plan: p, dialer: d}
		case p.Protocol == "h2":
			conn, err := d.dial()
			if err != nil {
				return nil, nil, err
			}
			if workers[i], err = newH2(p, conn); err != nil {
				return nil, nil, err
			}
		default:
			conn, err := d.dial()
			if err != nil {
				return nil, nil, err
			}
			workers[i] = newH1(p, d, conn, rand.New(rand.NewSource(int64(i))))
		}
	}
	idle := make([]*h1, p.Idle)
	for i := range idle {
		conn, err := d.dial()
		if err != nil {
			return nil, nil, fmt.Errorf("idle connection %d: %w", i, err)
		}
		idle[i] = newH1(p, d, conn, nil)
	}
	return workers, idle, nil
}

type stretch struct {
	sum     tally
	seconds float64
}

func load(workers []worker, seconds float64) stretch {
	start := time.Now()
	until := start.Add(time.Duration(seconds * float64(time.Second)))
	tallies := make([]tally, len(workers))
	var all sync.WaitGroup
	for i, one := range workers {
		all.Go(func() { one.run(start, until, &tallies[i]) })
	}
	all.Wait()
	done := stretch{seconds: time.Since(start).Seconds()}
	for _, t := range tallies {
		done.sum.answers += t.answers
		done.sum.units += t.units
		done.sum.reopened += t.reopened
		done.sum.latencies = append(done.sum.latencies, t.latencies...)
		for reason, count := range t.wrong {
			for range count {
				done.sum.failed(reason)
			}
		}
	}
	return done
}

func (s *stretch) result() result {
	slices.Sort(s.sum.latencies)
	at := func(share float64) float64 {
		if len(s.sum.latencies) == 0 {
			return 0
		}
		return float64(s.sum.latencies[int(share*float64(len(s.sum.latencies)-1))]) / 1e6
	}
	wrong := map[string]int{}
	for reason, count := range s.sum.wrong {
		wrong[reason] = count
	}
	return result{
		Answers: s.sum.answers, Units: s.sum.units, Reopened: s.sum.reopened, Seconds: s.seconds,
		P50: at(0.5), P90: at(0.9), P99: at(0.99), P999: at(0.999), Wrong: wrong,
	}
}

// dialer opens connections: TLS 1.3 with the client's SVID, to a server that proves the ID of the plan.
type dialer struct {
	plan   *plan
	config *tls.Config
}

func newDialer(p *plan) (*dialer, error) {
	if p.Cert == "" {
		return &dialer{plan: p}, nil
	}
	pair, err := tls.LoadX509KeyPair(p.Cert, p.Key)
	if err != nil {
		return nil, err
	}
	pem, err := os.ReadFile(p.Anchors)
	if err != nil {
		return nil, err
	}
	anchors := x509.NewCertPool()
	if !anchors.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s holds no certificate", p.Anchors)
	}
	alpn := "http/1.1"
	if p.Protocol == "h2" {
		alpn = "h2"
	}
	return &dialer{plan: p, config: &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{pair}, NextProtos: []string{alpn},
		CurvePreferences: []tls.CurveID{tls.X25519}, // one that all peers have
		// An SVID has no DNS name, so Go's own check cannot pass; the one below takes its place.
		InsecureSkipVerify: true,
		VerifyConnection: func(state tls.ConnectionState) error {
			if state.NegotiatedProtocol != alpn {
				return fmt.Errorf("the server speaks %q and not %q", state.NegotiatedProtocol, alpn)
			}
			return verified(state, anchors, p.Server)
		},
	}}, nil
}

func verified(state tls.ConnectionState, anchors *x509.CertPool, id string) error {
	leaf := state.PeerCertificates[0]
	between := x509.NewCertPool()
	for _, one := range state.PeerCertificates[1:] {
		between.AddCert(one)
	}
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: anchors, Intermediates: between}); err != nil {
		return err
	}
	if len(leaf.URIs) != 1 || leaf.URIs[0].String() != id {
		return fmt.Errorf("the server proves %v and not %s", leaf.URIs, id)
	}
	return nil
}

func (d *dialer) dial() (net.Conn, error) {
	conn, err := net.DialTimeout("tcp", d.plan.Address, patience)
	if err != nil {
		return nil, err
	}
	opened.Add(1)
	if d.config == nil {
		return conn, nil
	}
	_ = conn.SetDeadline(time.Now().Add(patience))
	secured := tls.Client(conn, d.config)
	if err := secured.Handshake(); err != nil {
		_ = conn.Close()
		return nil, err
	}
	_ = conn.SetDeadline(time.Time{})
	return secured, nil
}

// reason is an error without what differs from connection to connection.
func reason(err error) string {
	text := err.Error()
	if _, after, found := strings.Cut(text, "->"); found {
		if _, cause, found := strings.Cut(after, ": "); found {
			return cause
		}
	}
	return text
}
